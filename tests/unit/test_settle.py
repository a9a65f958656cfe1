"""When a file counts as settled, and in which order storage may change (DESIGN 6.1, 6.2)."""

from __future__ import annotations

import pytest

from heeler_sync.settle import Settler, SettleTimes

TIMES = SettleTimes(debounce=0.5, open_wait=5.0, max_wait=60.0)


@pytest.fixture
def settler() -> Settler:
    return Settler(TIMES)


def send(settler: Settler, path: str) -> None:
    settler.start(path)
    settler.done(path, durable=True)


def test_nothing_is_busy_at_first(settler: Settler) -> None:
    assert not settler.busy
    assert settler.quiet(100.0) == []
    assert settler.next_due() is None
    assert settler.oldest() is None
    assert settler.deletable() == []


def test_a_closed_file_is_quiet_after_the_debounce_and_not_before(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=True)
    assert settler.quiet(10.49) == []
    assert settler.next_due() == 10.5
    assert settler.quiet(10.5) == ["a"]


def test_each_change_starts_the_debounce_again(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=True)
    settler.changed("a", 10.4, closed=True)
    assert settler.quiet(10.6) == []
    assert settler.quiet(10.9) == ["a"]
    assert settler.oldest() == 10.0


def test_a_state_that_is_settled_already_needs_no_wait(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=True, settled=True)
    assert settler.quiet(10.0) == ["a"]


def test_a_file_held_open_waits_for_open_wait_after_its_last_change(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=False)
    assert settler.quiet(10.5) == ["a"]
    assert not settler.waited_open("a", 10.5)
    settler.hold("a")
    assert settler.quiet(14.99) == []
    assert settler.next_due() == 15.0
    assert settler.quiet(15.0) == ["a"]
    assert settler.waited_open("a", 15.0)


def test_a_file_that_is_closed_while_it_waits_open_needs_the_debounce_only(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=False)
    settler.hold("a")
    settler.changed("a", 11.0, closed=True)
    assert settler.quiet(11.5) == ["a"]


def test_a_file_that_goes_on_changing_while_open_goes_on_waiting(settler: Settler) -> None:
    now = 10.0
    for _ in range(20):
        settler.changed("a", now, closed=False)
        now += 0.6
        for path in settler.quiet(now):
            assert not settler.waited_open(path, now)
            settler.hold(path)
    assert settler.quiet(now + 4.0) == []


def test_a_file_on_its_way_is_not_sent_a_second_time_until_the_first_has_ended(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=True)
    settler.start("a")
    settler.changed("a", 11.0, closed=True)
    assert settler.quiet(99.0) == []
    assert settler.next_due() is None
    assert settler.unsent() == {"a"}
    settler.done("a", durable=True)
    assert settler.quiet(99.0) == ["a"]
    send(settler, "a")
    assert not settler.busy
    assert settler.unsent() == set()


def test_a_vanished_file_is_deleted_only_if_storage_has_it_or_will(settler: Settler) -> None:
    settler.vanished("never stored", stored=False)
    settler.changed("on its way", 1.0, closed=True)
    settler.start("on its way")
    settler.vanished("on its way", stored=False)
    settler.vanished("stored", stored=True)
    settler.done("on its way", durable=True)
    assert sorted(settler.deletable()) == ["on its way", "stored"]


def test_a_file_that_vanished_before_it_was_sent_is_forgotten(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=True)
    settler.vanished("a", stored=False)
    assert not settler.busy


def test_a_deletion_waits_for_every_earlier_change_and_for_no_later_one(settler: Settler) -> None:
    settler.changed("new checkpoint", 10.0, closed=True)
    settler.vanished("old checkpoint", stored=True)
    settler.changed("later", 10.1, closed=True)
    assert settler.deletable() == []
    settler.start("new checkpoint")
    assert settler.deletable() == []
    settler.done("new checkpoint", durable=True)
    assert settler.deletable() == ["old checkpoint"]


def test_a_deletion_still_waits_when_the_earlier_change_is_overtaken_by_a_newer_one(settler: Settler) -> None:
    settler.changed("new", 10.0, closed=True)
    settler.vanished("old", stored=True)
    settler.start("new")
    settler.changed("new", 10.2, closed=True)
    assert settler.deletable() == []
    settler.done("new", durable=True)
    assert settler.deletable() == ["old"]


def test_a_deletion_is_not_released_by_an_attempt_that_was_superseded(settler: Settler) -> None:
    """step2 is on its way, step1 is deleted, step2 is written again: its first state never got there."""
    settler.changed("step2", 10.0, closed=True)
    settler.start("step2")
    settler.vanished("step1", stored=True)
    settler.changed("step2", 10.2, closed=True)
    settler.done("step2", durable=False)
    assert settler.deletable() == []
    settler.start("step2")
    settler.done("step2", durable=True)
    assert settler.deletable() == ["step1"]


def test_a_renamed_file_keeps_its_place_before_a_deletion(settler: Settler) -> None:
    """Write x.tmp, delete the old checkpoint, rename x.tmp to the new one."""
    settler.changed("x.tmp", 10.0, closed=True)
    settler.vanished("old", stored=True)
    settler.changed("new", 10.1, closed=True)
    settler.vanished("x.tmp", stored=False)
    assert settler.deletable() == []
    send(settler, "new")
    assert settler.deletable() == ["old"]


def test_a_file_renamed_while_it_is_sent_keeps_its_place_too(settler: Settler) -> None:
    settler.changed("x.tmp", 10.0, closed=True)
    settler.start("x.tmp")
    settler.vanished("old", stored=True)
    settler.changed("new", 10.1, closed=True)
    settler.vanished("x.tmp", stored=False)
    settler.done("x.tmp", durable=False)
    assert "old" not in settler.deletable()
    send(settler, "new")
    assert "old" in settler.deletable()


def test_nothing_is_sent_or_deleted_when_the_folder_as_a_whole_is_gone(settler: Settler) -> None:
    settler.vanished("a", stored=True)
    settler.changed("b", 1.0, closed=True)
    settler.forget()
    assert settler.deletable() == []
    assert not settler.busy


def test_a_file_that_comes_back_before_its_deletion_is_sent_instead(settler: Settler) -> None:
    settler.vanished("a", stored=True)
    settler.changed("a", 10.0, closed=True)
    assert settler.deletable() == []
    assert settler.quiet(10.5) == ["a"]


def test_a_file_that_comes_back_during_its_deletion_waits_for_the_end_of_it(settler: Settler) -> None:
    settler.vanished("a", stored=True)
    settler.delete("a")
    assert settler.busy
    settler.changed("a", 10.0, closed=True)
    assert settler.is_dirty("a")
    assert settler.quiet(99.0) == []
    assert settler.next_due() is None
    settler.deleted("a")
    assert settler.quiet(99.0) == ["a"]


def test_a_file_that_comes_back_and_goes_again_during_its_deletion_is_not_deleted_twice_at_once(
    settler: Settler,
) -> None:
    """Two deletions of one key at once: the second could land after the upload of a file that came back."""
    settler.vanished("a", stored=True)
    settler.delete("a")
    settler.changed("a", 10.0, closed=True)
    settler.vanished("a", stored=True)
    assert settler.deletable() == []
    settler.deleted("a")
    assert settler.deletable() == ["a"]


def test_a_vanished_file_keeps_its_first_place_in_the_order(settler: Settler) -> None:
    settler.vanished("a", stored=True)
    settler.changed("b", 10.0, closed=True)
    settler.vanished("a", stored=True)
    assert settler.deletable() == ["a"]


def test_after_a_crash_only_what_had_settled_is_still_sent(settler: Settler) -> None:
    settler.changed("settled", 10.0, closed=True)
    settler.changed("just closed", 19.8, closed=True)
    settler.changed("never closed", 16.0, closed=False)
    settler.changed("open, long quiet", 15.0, closed=False)
    settler.changed("open", 16.0, closed=True)
    settler.hold("open")
    settler.changed("on its way", 10.0, closed=True)
    settler.start("on its way")
    settler.vanished("gone", stored=True)
    settler.drop_unsettled(20.0)
    assert settler.unsent() == {"settled", "on its way", "open, long quiet"}
    settler.done("on its way", durable=True)
    send(settler, "settled")
    send(settler, "open, long quiet")
    assert settler.deletable() == []
    assert not settler.busy


def test_a_file_that_does_not_settle_is_told_once(settler: Settler) -> None:
    settler.changed("a", 10.0, closed=False)
    settler.changed("a", 69.0, closed=False)
    assert list(settler.overdue(69.9)) == []
    assert list(settler.overdue(70.0)) == ["a"]
    assert list(settler.overdue(71.0)) == []


def test_several_paths_settle_each_by_itself(settler: Settler) -> None:
    for count in range(5):
        settler.changed(f"f{count}", 10.0 + count, closed=True)
    assert settler.quiet(12.5) == ["f0", "f1", "f2"]
    assert settler.next_due() == 10.5
    settler.start("f0")
    assert settler.quiet(12.5) == ["f1", "f2"]
