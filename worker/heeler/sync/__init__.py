"""`heeler sync`: folders brought to storage and back by hand, and prefixes looked at and mended.

`commands` reads arguments; `push`, `pull`, `watch`, `look`, `verify` and `repair` are one command each; `place` opens a
URL, `voice` speaks to a terminal or a pipe, `hold` takes a prefix, `compare` tells what differs, `state` remembers.
"""
