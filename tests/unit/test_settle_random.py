"""Random histories of a folder: the order of what storage sees is safe, and in the end bucket and folder agree."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from heeler_sync.settle import Settler, SettleTimes

PATHS = st.sampled_from(["a", "b"])


class FolderAndBucket(RuleBasedStateMachine):
    """A model of `Mirror`: calls on their way end in any order; what they do to the bucket is done at their end."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.version = 0
        self.settler = Settler(SettleTimes(debounce=1.0, open_wait=5.0))
        self.folder: dict[str, int] = {}
        self.bucket: dict[str, int] = {}
        self.stored: set[str] = set()
        self.sending: dict[str, int] = {}
        self.deleting: list[str] = []
        # Changes that must be durable before a deletion: by vanished path, what was unsent then.
        self.owed: dict[str, dict[str, int]] = {}

    @rule(path=PATHS, closed=st.booleans())
    def write(self, path: str, closed: bool) -> None:
        self.version += 1
        self.folder[path] = self.version
        self.owed.pop(path, None)
        self.settler.changed(path, self.now, closed=closed)

    @precondition(lambda self: self.folder)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.folder)))
        del self.folder[path]
        for versions in self.owed.values():
            versions.pop(path, None)  # removed on purpose: nobody waits for what it held
        self._vanished(path)

    def _vanished(self, path: str) -> None:
        if path not in self.owed:
            self.owed[path] = {other: version for other, version in self.folder.items() if other != path}
        self.settler.vanished(path, stored=path in self.stored)

    @rule(seconds=st.sampled_from([0.3, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def start_uploads(self) -> None:
        for path in self.settler.quiet(self.now):
            assert path not in self.sending, "sent twice at once"
            assert path not in self.deleting, "sent while it is being deleted"
            if path not in self.folder:
                self._vanished(path)
            else:
                self.settler.start(path)
                self.sending[path] = self.folder[path]

    @precondition(lambda self: self.sending)
    @rule(data=st.data())
    def end_upload(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.sending)))
        self.bucket[path] = self.sending.pop(path)
        self.stored.add(path)
        self.settler.done(path, durable=True)

    @rule()
    def start_deletes(self) -> None:
        for path in self.settler.deletable():
            assert path not in self.deleting, "deleted twice at once"
            assert path not in self.sending, "deleted while it is being sent"
            for other, version in self.owed.get(path, {}).items():
                newer = self.bucket.get(other, 0) >= version
                dropped = other not in self.folder or other in self.owed
                assert newer or dropped, f"{path} deleted before {other} version {version} was durable"
            self.settler.delete(path)
            self.deleting.append(path)

    @precondition(lambda self: self.deleting)
    @rule(data=st.data())
    def end_delete(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.deleting)))
        self.deleting.remove(path)
        if not self.settler.is_dirty(path):
            self.bucket.pop(path, None)
            self.stored.discard(path)
        self.settler.deleted(path)

    @invariant()
    def never_both_ways_at_once(self) -> None:
        if hasattr(self, "settler"):
            assert not set(self.sending) & set(self.deleting)
            assert set(self.sending) <= self.settler.unsent()

    def teardown(self) -> None:
        if not hasattr(self, "settler"):
            return
        for _ in range(20):
            self.now += 10.0
            self.start_uploads()
            for path in list(self.sending):
                self.bucket[path] = self.sending.pop(path)
                self.stored.add(path)
                self.settler.done(path, durable=True)
            self.start_deletes()
            for path in list(self.deleting):
                self.deleting.remove(path)
                if not self.settler.is_dirty(path):
                    self.bucket.pop(path, None)
                    self.stored.discard(path)
                self.settler.deleted(path)
            if not self.settler.busy:
                break
        assert not self.settler.busy
        assert self.bucket == self.folder
        assert self.stored == set(self.folder)


def test_whatever_happens_the_order_is_safe_and_the_bucket_ends_as_the_folder() -> None:
    run_state_machine_as_test(
        FolderAndBucket, settings=settings(max_examples=250, stateful_step_count=50, deadline=None, print_blob=True)
    )
