"""When a tree counts as complete: by quiet, or by the file that the program writes last. Never a mix of two."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest

from heeler_sync.snapshot.moments import LIVES_ON, Moment, QuietMoment, ReadyMoment
from heeler_sync.snapshot.scan import TICK_SECONDS, Found, TreeScan
from heeler_sync.tree import Stamp
from heeler_sync.watch import CHANGED, CLOSED, GONE, Batch

QUIET = 2.0
NS = 10**9


def found(ctime: float, size: int = 1) -> Found:
    return Found(Stamp(size, int(ctime * NS), int(ctime * NS), 1), 0o644)


def scan(**files: float) -> TreeScan:
    """A scan of files with these change times; "ready" is the file that the program writes last."""
    return TreeScan(files={path: found(ctime) for path, ctime in files.items()})


def batch(*events: tuple[str, str], rescan: bool = False, implied: set[str] | None = None) -> Batch:
    return Batch(dict(events), rescan, implied or set())


def changed(*names: str) -> Batch:
    return batch(*[(name, CHANGED) for name in names])


def closed(*names: str) -> Batch:
    return batch(*[(name, CLOSED) for name in names])


# By quiet.


@pytest.fixture
def quiet() -> QuietMoment:
    return QuietMoment(QUIET)


def test_nothing_changed_is_nothing_to_take(quiet: QuietMoment) -> None:
    assert quiet.due() == math.inf
    quiet.take(Batch(), 5.0)
    quiet.scanned(scan(a=1), 6.0)
    quiet.scanned(scan(a=1), 66.0)
    assert quiet.due() == math.inf
    assert not quiet.certain


@pytest.mark.parametrize("news", [changed("a"), closed("a"), batch(("a", GONE)), batch(rescan=True)], ids=repr)
def test_a_tree_is_due_when_nothing_has_changed_for_a_while(quiet: QuietMoment, news: Batch) -> None:
    quiet.take(news, 10.0)
    assert quiet.due() == quiet.settled() == 12.0
    quiet.take(changed("b"), 11.0)
    assert quiet.due() == 13.0
    assert quiet.late(scan(a=99), 13.0) == set()


def test_what_was_changed_after_the_last_change_that_was_told_is_late() -> None:
    """Its event is still on its way: the program may be in the middle of a save, or have died in one."""
    quiet = QuietMoment(QUIET, wall=lambda: 1013 * NS)
    quiet.take(changed("a"), 10.0)
    assert quiet.late(scan(a=1010.0, old=5.0), 13.0) == set()
    assert quiet.late(scan(a=1010.0, b=1012.9), 13.0) == {"b"}


def test_the_wait_is_twice_the_longest_gap_inside_a_checkpoint(quiet: QuietMoment) -> None:
    quiet.take(changed("a"), 10.0)
    quiet.take(changed("a"), 11.5)
    assert (quiet.window, quiet.due()) == (3.0, 14.5)
    quiet.take(changed("a"), 12.0)
    assert (quiet.window, quiet.due()) == (3.0, 15.0), "a shorter gap unlearns nothing"


def test_a_change_long_after_the_tree_was_due_is_of_the_next_checkpoint_though_none_was_taken(
    quiet: QuietMoment,
) -> None:
    """Commits are 15 s apart: a program that saves, or logs, every 10 s would never be committed again."""
    for save in range(30):
        quiet.take(changed("a"), 10.0 * save)
    assert quiet.due() == 292.0


def test_the_pause_between_two_checkpoints_is_no_gap_inside_one(quiet: QuietMoment) -> None:
    quiet.take(changed("a"), 10.0)
    quiet.begin()
    quiet.taken()
    quiet.take(changed("a"), 500.0)
    assert (quiet.window, quiet.due()) == (QUIET, 502.0)


def test_what_was_taken_is_no_longer_due_and_what_came_meanwhile_is(quiet: QuietMoment) -> None:
    quiet.take(changed("a"), 10.0)
    quiet.begin()
    quiet.taken()
    assert quiet.due() == math.inf
    quiet.take(changed("a"), 20.0)
    quiet.begin()
    quiet.take(changed("b"), 20.5)
    quiet.taken()
    assert quiet.due() == 22.5


def test_a_scan_that_differs_is_a_change_that_no_event_told(quiet: QuietMoment) -> None:
    quiet.scanned(scan(a=1), 0.0)
    quiet.scanned(scan(a=2), 60.0)
    assert quiet.due() == 62.0


def test_a_scan_that_differs_while_a_change_is_known_moves_nothing(quiet: QuietMoment) -> None:
    quiet.scanned(scan(a=1), 0.0)
    quiet.take(changed("a"), 60.0)
    quiet.scanned(scan(a=2), 61.0)
    assert quiet.due() == 62.0


def test_a_scan_sees_folders_and_links_too(quiet: QuietMoment) -> None:
    for other in (TreeScan(folders={"d": 0o755}), TreeScan(links={"l": "a"})):
        moment = QuietMoment(QUIET)
        moment.scanned(TreeScan(), 0.0)
        moment.scanned(other, 1.0)
        assert moment.due() == 3.0


# By the file that is written last.


@pytest.fixture
def ready() -> ReadyMoment:
    return ReadyMoment(lambda path: path == "ready", QUIET)


def test_a_ready_file_that_was_closed_is_due_at_once_and_certain_a_moment_later(ready: ReadyMoment) -> None:
    ready.take(closed("a"), 9.0)
    assert ready.due() == math.inf
    ready.take(closed("ready"), 10.0)
    assert (ready.due(), ready.certain) == (10.0, True)
    assert 10.0 < ready.settled() <= 10.1
    assert ready.late(scan(a=9.0, ready=10.0), 10.0) == set()


def test_other_files_alone_are_never_due(ready: ReadyMoment) -> None:
    ready.take(closed("a", "b"), 1.0)
    ready.take(batch(rescan=True), 2.0)
    assert ready.due() == ready.settled() == math.inf
    assert ready.late(scan(a=1.0), 900.0) == {"a"}


def test_a_file_with_a_later_event_is_late_whatever_its_stamp_says(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    ready.take(changed("a"), 10.1)
    assert ready.late(scan(a=9.0, ready=10.0), 99.0) == {"a"}


def test_the_order_inside_one_batch_counts(ready: ReadyMoment) -> None:
    ready.take(closed("ready", "a"), 10.0)
    assert ready.late(scan(a=9.0, ready=10.0), 99.0) == {"a"}


def test_a_file_with_a_later_stamp_is_late_though_its_event_has_not_come(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    assert ready.late(scan(a=10.001, ready=10.0), 99.0) == {"a"}


def test_in_one_tick_only_the_order_tells_and_only_once_all_events_have_come(ready: ReadyMoment) -> None:
    ready.take(closed("a"), 10.0)
    ready.take(closed("ready"), 10.1)
    tie = scan(a=10.0, ready=10.0)
    assert ready.late(tie, 10.2) == {"a"}
    assert ready.late(tie, 10.8) == set()
    ready.take(changed("a"), 10.9)
    assert ready.late(tie, 99.0) == {"a"}


def test_in_one_tick_without_sure_order_quiet_tells(ready: ReadyMoment) -> None:
    ready.take(batch(("new/a", CHANGED), ("ready", CLOSED), rescan=True, implied={"new/a"}), 10.0)
    tie = TreeScan(files={"new/a": found(10.0), "ready": found(10.0)})
    assert ready.late(tie, 11.0) == {"new/a"}
    assert ready.late(tie, 12.0) == set()


def test_files_of_a_new_folder_are_told_by_their_stamps(ready: ReadyMoment) -> None:
    ready.take(batch(("new/a", CHANGED), rescan=True, implied={"new/a"}), 10.0)
    ready.take(closed("ready"), 10.1)
    assert ready.late(TreeScan(files={"new/a": found(9.9), "ready": found(10.0)}), 10.2) == set()
    assert ready.late(TreeScan(files={"new/a": found(10.1), "ready": found(10.0)}), 10.2) == {"new/a"}


def test_a_ready_file_in_a_new_folder_is_due_at_once_and_settled_when_all_is_quiet() -> None:
    """Its events came before the folder was watched: nobody saw it being closed."""
    ready = ReadyMoment(lambda path: path.endswith("/ready"), QUIET)
    ready.take(batch(("new/a", CHANGED), ("new/ready", CHANGED), rescan=True, implied={"new/a", "new/ready"}), 10.0)
    tree = TreeScan(files={"new/a": found(9.8), "new/ready": found(9.9)})
    assert (ready.due(), ready.settled()) == (10.0, 12.0)
    assert ready.must_be_closed(tree) == {"new/ready"}, "it may be half written: /proc tells"
    assert ready.late(tree, 10.0) == set()
    for now in (10.0, 12.0):
        assert ready.late(TreeScan(files={"new/a": found(9.95), "new/ready": found(9.9)}), now) == {"new/a"}


def test_in_one_tick_with_a_ready_file_that_nobody_saw_being_closed_only_quiet_tells() -> None:
    wall = [10 * NS]
    ready = ReadyMoment(lambda path: path == "ready", QUIET, wall=lambda: wall[0])
    ready.take(closed("a"), 9.9)
    ready.take(changed("ready"), 10.0)
    tie = scan(a=10.0, ready=10.0)
    wall[0] = 11 * NS
    assert ready.late(tie, 11.0) == {"a"}, "however old it is: events do not tell the order"
    wall[0] = 12 * NS
    assert ready.late(tie, 12.0) == set()
    fresh = scan(a=11.9, ready=11.9)
    assert ready.late(fresh, 12.0) == {"a"}, "changed just now, and the event is on its way: that is not quiet"


def test_a_ready_file_that_is_being_written_is_due_and_settled_only_by_its_end(ready: ReadyMoment) -> None:
    """A writer may pause for longer than any quiet time, and die in it."""
    ready.take(closed("a"), 9.0)
    ready.take(changed("ready"), 10.0)
    assert (ready.due(), ready.settled()) == (10.0, math.inf)
    assert ready.must_be_closed(scan(a=9.0, ready=10.0)) == {"ready"}
    ready.take(changed("ready"), 11.0)
    assert (ready.due(), ready.settled()) == (11.0, math.inf)
    ready.take(closed("ready"), 11.5)
    assert (ready.due(), ready.settled()) == (11.5, 11.5 + LIVES_ON)


def test_a_ready_file_that_is_written_anew_is_no_longer_the_one_that_was_closed(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    ready.take(changed("ready"), 10.5)
    assert (ready.due(), ready.settled()) == (10.5, math.inf)
    assert ready.late(scan(a=9.0, b=10.45, ready=10.5), 10.5) == set()
    assert ready.late(scan(a=9.0, b=10.55, ready=10.5), 10.5) == {"b"}


def test_what_nobody_told_of_is_unheard_the_ready_file_itself_too() -> None:
    """The program died, and may have died in writing these: that they are closed by now says nothing."""
    wall = [10 * NS]
    ready = ReadyMoment(lambda path: path == "ready", QUIET, wall=lambda: wall[0])
    ready.take(closed("a", "ready"), 10.0)
    wall[0] = 11 * NS
    ready.take(closed("log"), 11.0)
    assert ready.unheard(scan(a=9.0, ready=10.0)) == set()
    assert ready.unheard(scan(a=10.5, log=10.9, ready=10.6)) == {"a", "log", "ready"}
    ready.take(changed("ready"), 11.0)
    assert ready.unheard(scan(a=10.5, ready=11.0)) == set()
    assert ready.unheard(scan(a=10.5, b=11.1, ready=11.2)) == {"b", "ready"}


def test_a_ready_file_that_was_moved_into_place_is_closed(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready.tmp"), 9.0)
    ready.take(batch(("ready.tmp", GONE), ("ready", CLOSED)), 10.0)
    assert (ready.due(), ready.certain) == (10.0, True)
    assert ready.late(scan(a=9.0, ready=10.0), 10.0) == set()


def test_the_newest_of_several_ready_files_counts() -> None:
    ready = ReadyMoment(lambda path: path.startswith("ready"), QUIET)
    ready.take(closed("a", "ready1", "b", "ready2"), 10.0)
    assert ready.late(scan(a=1, ready1=2, b=3, ready2=4), 10.0) == set()
    ready.take(closed("c"), 11.0)
    assert ready.late(scan(a=1, ready1=2, b=3, ready2=4, c=5), 11.0) == {"c"}


def test_deleting_what_is_old_after_the_end_does_not_undo_it(ready: ReadyMoment) -> None:
    """A program that rotates: it deletes the checkpoint before when the new one is complete."""
    ready.take(closed("old", "a", "ready"), 10.0)
    ready.take(batch(("old", GONE)), 10.1)
    assert ready.due() == 10.0
    assert ready.late(scan(a=9.0, ready=10.0), 10.2) == set()


def test_a_link_that_points_elsewhere_after_the_end_is_late(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    tree = TreeScan({"a": found(9.0), "ready": found(10.0)}, {}, {"latest": "a"}, {"latest": found(9.5).stamp.ctime_ns})
    assert ready.late(tree, 10.1) == set()
    ready.take(changed("latest"), 10.2)
    assert ready.late(tree, 99.0) == {"latest"}


def test_a_ready_file_that_is_gone_again_is_not_there(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    ready.take(batch(("ready", GONE)), 10.1)
    assert ready.late(scan(a=9.0), 99.0) != set(), "without it, nothing says that this tree is complete"


def test_taken_forgets_what_was_taken_and_keeps_what_came_meanwhile(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    ready.begin()
    ready.taken()
    assert ready.due() == math.inf
    ready.take(closed("a", "ready"), 20.0)
    ready.begin()
    ready.take(closed("b"), 20.1)
    ready.taken()
    assert ready.due() == math.inf
    ready.take(closed("ready"), 20.2)
    assert ready.due() == 20.2
    assert ready.late(scan(a=19.0, b=20.1, ready=20.2), 20.2) == set()
    ready.begin()
    ready.take(closed("a", "ready"), 30.0)
    ready.taken()
    assert ready.due() == 30.0


def test_the_order_of_what_came_meanwhile_is_kept(ready: ReadyMoment) -> None:
    ready.take(closed("a", "ready"), 10.0)
    ready.begin()
    ready.take(closed("ready", "a"), 20.0)
    ready.taken()
    assert ready.late(scan(a=5.0, ready=20.0), 99.0) == {"a"}


def test_the_order_in_which_a_new_folders_files_are_found_says_nothing(ready: ReadyMoment) -> None:
    ready.take(closed("ready"), 10.0)
    ready.take(batch(("new/a", CHANGED), rescan=True, implied={"new/a"}), 10.1)
    assert ready.late(TreeScan(files={"new/a": found(9.0), "ready": found(10.0)}), 13.0) == set()


def test_a_ready_file_that_a_scan_found_changed_is_due_at_once_and_settled_when_all_is_quiet(
    ready: ReadyMoment,
) -> None:
    """Its events were lost."""
    ready.scanned(scan(a=1, ready=2), 0.0)
    assert ready.due() == math.inf
    ready.scanned(scan(a=59, ready=60), 61.0)
    assert (ready.due(), ready.settled()) == (61.0, 63.0)
    for now in (61.0, 63.0):
        assert ready.late(scan(a=59, ready=60), now) == set()
        assert ready.late(scan(a=61, ready=60), now) == {"a"}
    assert ready.late(scan(a=60, ready=60), 61.0) == {"a"}


def by_folder() -> ReadyMoment:
    return ReadyMoment(lambda path: path.endswith("/ready"), QUIET)


def test_a_ready_file_that_was_taken_is_not_found_anew_by_the_next_scan() -> None:
    """Each checkpoint has a folder and a ready file of its own: the old one never changes again."""
    ready = by_folder()
    ready.scanned(TreeScan(), 0.0)
    ready.take(closed("1/model", "1/ready"), 10.0)
    ready.begin()
    ready.taken()
    first = {"1/model": found(9.0), "1/ready": found(10.0)}
    ready.scanned(TreeScan(first), 60.0)
    assert ready.due() == math.inf
    ready.take(closed("2/model", "2/ready"), 70.0)
    assert (ready.due(), ready.certain) == (70.0, True)
    assert ready.late(TreeScan({**first, "2/model": found(69.0), "2/ready": found(70.0)}), 70.0) == set()


def test_a_ready_file_whose_end_nobody_saw_does_not_stand_in_the_way_of_a_newer_one() -> None:
    ready = by_folder()
    ready.scanned(TreeScan(), 0.0)
    first = {"1/model": found(59.0), "1/ready": found(60.0)}
    ready.scanned(TreeScan(first), 60.0)
    ready.take(closed("2/model", "2/ready"), 70.0)
    tree = TreeScan({**first, "2/model": found(69.0), "2/ready": found(70.0)})
    assert ready.due() <= 72.0
    assert ready.late(tree, 72.0) == set()


def test_a_ready_file_that_is_watched_is_not_found_anew_by_a_scan(ready: ReadyMoment) -> None:
    ready.scanned(scan(a=1, ready=2), 0.0)
    ready.take(closed("a", "ready"), 10.0)
    ready.scanned(scan(a=9, ready=10), 11.0)
    assert (ready.due(), ready.certain) == (10.0, True)


# What was there before anybody watched.


@pytest.mark.parametrize(
    "moment", [QuietMoment(QUIET), ReadyMoment(lambda path: path == "ready", QUIET)], ids=["quiet", "ready"]
)
def test_a_first_scan_of_an_unchanged_tree_makes_nothing_due(moment: Moment) -> None:
    moment.scanned(scan(a=1, ready=2), 10.0)
    assert moment.due() == math.inf


# A program, a disk and a watcher, at random.


@dataclass
class World:
    """A program that writes checkpoints, the disk, and events on their way to us, in order and late by up to 0.5 s."""

    rng: random.Random
    links: bool
    now: float = 1000.0
    inode: int = 0
    arrival: float = 0.0
    files: dict[str, tuple[Found, tuple[int, bool]]] = field(default_factory=dict)
    latest: int | None = None
    latest_time: int = 0
    open: set[str] = field(default_factory=set)
    shown: str = ""
    events: list[tuple[float, str, str]] = field(default_factory=list)
    plan: list[tuple[float, str, str, int]] = field(default_factory=list)
    killed: float = math.inf
    notice: float = 0.0
    """Seconds until we notice that the program was killed."""

    def event(self, path: str, what: str) -> None:
        self.arrival = max(self.arrival, self.now + self.rng.choice([0.0, 0.001, 0.05, self.rng.uniform(0, 0.5)]))
        self.events.append((self.arrival, path, what))

    def ctime(self) -> int:
        """The kernel's clock moves in ticks of 4 ms."""
        return int(self.now / 0.004) * 4_000_000

    def set(self, path: str, number: int, whole: bool, inode: int | None = None) -> None:
        if inode is None:
            self.inode += 1
            inode = self.inode
        size = 10 * number + (1 if whole else 0)
        self.files[path] = (Found(Stamp(size, self.ctime(), self.ctime(), inode), 0o644), (number, whole))

    def do(self, what: str, path: str, number: int) -> None:
        if what == "open":
            self.open.add(path)
            old = self.files.get(path)
            self.set(path, number, False, old[0].stamp.inode if old else None)
            self.event(path, CHANGED)
        elif what == "write":
            self.set(path, number, True, self.files[path][0].stamp.inode)
            self.event(path, CHANGED)
        elif what == "close":
            self.open.discard(path)
            self.event(path, CLOSED)
        elif what == "kill":
            self.killed = self.now
            for name in sorted(self.open):
                self.event(name, CLOSED)
            self.open.clear()
        elif what == "rename":
            there, content = self.files.pop(path + ".tmp")
            stamp = there.stamp
            renamed = Stamp(stamp.size, stamp.mtime_ns, self.ctime(), stamp.inode)
            self.files[path] = (there._replace(stamp=renamed), content)
            self.event(path + ".tmp", GONE)
            self.event(path, CLOSED)
        else:
            self.latest, self.latest_time = number, self.ctime()
            self.event("latest", CHANGED)

    def gap(self) -> float:
        return self.rng.choice([0.0, 0.0, 0.0, 0.0005, 0.003, 0.02, 0.2, 0.7, 3.0, self.rng.uniform(0, 2)])

    def write_plan(self, checkpoints: int) -> None:
        """All that the program will do."""
        at = self.now + 0.1
        for number in range(1, checkpoints + 1):
            names = ["a", "b", "ready"]
            if self.links:
                names.insert(self.rng.randrange(3), "latest")
            for name in names:
                rename = self.rng.random() < 0.5
                target = name + ".tmp" if rename else name
                steps = [
                    ("open", target),
                    ("write", target),
                    ("close", target),
                    *([("rename", name)] if rename else []),
                ]
                for what, path in [("link", name)] if name == "latest" else steps:
                    at += self.gap()
                    self.plan.append((at, what, path, number))
            at += self.rng.choice([0.0, 0.002, 0.3, 1.0, 5.0, 70.0])

    def kill_somewhere(self) -> None:
        """Right after one of its steps, or a moment later; that is the last step."""
        self.notice = self.rng.choice([0.0, 0.001, 0.01, 0.04])
        last = self.rng.randrange(len(self.plan))
        self.plan[last + 1 :] = [(self.plan[last][0] + self.gap(), "kill", "", 0)]

    def advance(self, to: float) -> Batch:
        """Let the program go on; what has arrived of its events by then."""
        while self.plan and self.plan[0][0] <= to:
            self.now, what, path, number = self.plan.pop(0)
            self.do(what, path, number)
        self.now = to
        news = Batch()
        while self.events and self.events[0][0] <= to:
            _, path, what = self.events.pop(0)
            news.files.pop(path, None)
            news.files[path] = what
        return news

    def scan(self) -> TreeScan:
        links = {} if self.latest is None else {"latest": str(self.latest)}
        times = dict.fromkeys(links, self.latest_time)
        return TreeScan({path: entry for path, (entry, _) in self.files.items()}, {}, links, times)

    def is_one_checkpoint(self) -> bool:
        contents = {path: content for path, (_, content) in self.files.items()}
        numbers = {number for number, _ in contents.values()} | ({self.latest} if self.links else set())
        return (
            contents.keys() == {"a", "b", "ready"}
            and all(whole for _, whole in contents.values())
            and len(numbers) == 1
        )


def look(world: World, moment: ReadyMoment, *, killable: bool = False, ended: bool = False) -> bool | None:
    """What a commit does, once; whether what it took is one checkpoint, None if it took nothing.

    With `killable` the program may die while the folder is looked at; `ended`: it has, and events are heard no more.
    """
    moment.begin()
    tick = world.ctime()
    first = world.scan()
    exact = world.is_one_checkpoint()
    if killable:
        moment.take(world.advance(world.now + world.gap()), world.now)
    if moment.late(first, world.now) or (ended and moment.unheard(first)):
        return None
    contents = {path: content for path, (_, content) in world.files.items()}
    world.shown = f"at {world.now:.4f} {contents}, latest {world.latest}"
    if world.open & moment.must_be_closed(first):
        return None
    if any(entry.stamp.ctime_ns >= tick for entry in first.files.values()):
        news = world.advance(world.now + TICK_SECONDS)
        moment.take(Batch() if ended else news, world.now)
    if not world.scan().same_tree(first):
        return None
    if killable:
        lived = world.now + LIVES_ON
        moment.take(world.advance(lived), world.now)
        if world.killed + world.notice < lived:
            return None
    if not ended and world.rng.random() < 0.5:
        moment.take(world.advance(world.now + world.gap()), world.now)
    moment.taken()
    return exact


def run(seed: int, *, links: bool) -> tuple[int, bool]:
    """How many trees were taken, and whether the last checkpoint was."""
    rng = random.Random(seed)
    world = World(rng, links)
    world.write_plan(rng.randint(1, 6))
    moment = ReadyMoment(lambda path: path == "ready", QUIET, world.ctime)
    taken, last, idle, next_scan = 0, False, 0, world.now
    while idle < 8:
        idle += not world.plan
        step = rng.choice([0.0005, 0.004, 0.05, 0.3, 1.0, QUIET]) if world.plan else QUIET
        news = world.advance(world.now + step)
        moment.take(news, world.now)
        if world.now >= next_scan:
            moment.scanned(world.scan(), world.now)
            next_scan = world.now + 60.0
        if moment.due() <= world.now:
            exact = look(world, moment)
            assert exact is not False, f"seed {seed}: {world.shown}"
            taken += exact is True
            last = exact is True and not world.plan if exact is not None else last
    return taken, last


@pytest.mark.parametrize("links", [False, True], ids=["files", "files and a link"])
def test_whatever_the_delays_what_is_taken_is_one_checkpoint_and_the_last_is_always_taken(links: bool) -> None:
    first = random.Random().randrange(2**40)
    print(f"seeds from {first}")
    total = 0
    for seed in range(first, first + 1000):
        taken, last = run(seed, links=links)
        total += taken
        assert last, f"seed {seed}: the last checkpoint was never taken"
    assert total > 1000


def run_killed(seed: int, *, links: bool) -> tuple[int, int]:
    """How many trees were taken while the program lived, and after it was killed somewhere."""
    rng = random.Random(seed)
    world = World(rng, links)
    world.write_plan(rng.randint(1, 4))
    world.kill_somewhere()
    moment = ReadyMoment(lambda path: path == "ready", QUIET, world.ctime)
    taken = 0
    while world.plan:
        moment.take(world.advance(world.now + rng.choice([0.0005, 0.004, 0.05, 0.3, 1.0, QUIET])), world.now)
        if world.now >= world.killed:
            break
        if rng.random() < 0.02:
            moment.scanned(world.scan(), world.now)
        if moment.due() <= world.now and rng.random() < 0.7:
            exact = look(world, moment, killable=True)
            assert exact is not False, f"seed {seed}: {world.shown}"
            taken += exact is True
    noticed = world.killed + world.notice
    moment.take(world.advance(max(world.now, noticed + world.gap())), world.now)
    if max(moment.due(), moment.settled()) > noticed:
        return taken, 0
    exact = look(world, moment, ended=True)
    assert exact is not False, f"seed {seed}: after its death, {world.shown}"
    return taken, exact is True


@pytest.mark.parametrize("links", [False, True], ids=["files", "files and a link"])
def test_wherever_a_program_is_killed_what_is_taken_is_one_checkpoint(links: bool) -> None:
    first = random.Random().randrange(2**40)
    print(f"seeds from {first}")
    taken = [run_killed(seed, links=links) for seed in range(first, first + 2000)]
    assert sum(before for before, _ in taken) > 500
    assert sum(after for _, after in taken) > 0


@pytest.mark.parametrize("seed", [118, 393, 3237])
def test_a_ready_file_that_is_being_written_again_is_not_complete_though_no_event_has_told_so_yet(seed: int) -> None:
    run(seed, links=False)


@pytest.mark.parametrize("seed", [58, 6507, 7981])
def test_a_link_that_points_elsewhere_is_late_though_no_event_has_told_so_yet(seed: int) -> None:
    run(seed, links=True)
