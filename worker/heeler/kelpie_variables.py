"""Variables of Kelpie's worker that have no setting here, and why (docs/from-kelpie.md has them all)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

STATE_FILE = "KELPIE_STATE_FILE"
_WITHOUT_EFFECT = {
    "MAX_RETRIES": "calls are repeated for as long as the job is ours, whatever their number",
}
_KNOWN = {
    "KELPIE_API_KEY",
    "KELPIE_API_URL",
    "KELPIE_JOB_ID",
    "KELPIE_LOG_LEVEL",
    "KELPIE_RECREATE_BETWEEN_JOBS",
    STATE_FILE,
}


def without_effect(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Those that are set and change nothing, each with the reason."""
    for name in sorted(environ):
        if name in _WITHOUT_EFFECT:
            yield name, _WITHOUT_EFFECT[name]
        elif name.startswith("KELPIE_") and name not in _KNOWN:
            yield name, "it is no variable of Kelpie's worker that heeler knows"
