"""heeler: the runtime inside the container that takes jobs, keeps their lease and keeps their files safe."""

from __future__ import annotations

__version__ = "0.1.0"
