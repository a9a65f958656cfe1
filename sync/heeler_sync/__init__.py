"""Files to objects and back: the sync half of heeler, usable alone.

This package knows nothing of jobs or queues and never imports `heeler`. What a caller uses is
`heeler_sync.session.Session`; what it stands on is the `ObjectStore` protocol in `heeler_sync.store`.
"""
