"""Snapshots: a folder's generations in storage, atomic and fenced (docs/snapshot-format.md).

`manifest`, `packs`, `head` hold the format; `holder` the protocol (acquire, commit, collect); `capture` and `restore`
go between a folder and a generation; `moments` says when; `folder` is the task that keeps one folder's generations.
"""
