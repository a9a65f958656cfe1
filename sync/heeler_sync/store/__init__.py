"""Object stores: one protocol, its implementations, and the quirks of providers.

`base` holds the protocol, `providers` the table of quirks, `s3` the implementation on obstore, `memory` a real
one for tests, `retry` the policy that wraps any of them.
"""

from heeler_sync.store.base import Condition, ObjectInfo, ObjectStore
from heeler_sync.store.providers import Provider

__all__ = ["Condition", "ObjectInfo", "ObjectStore", "Provider"]
