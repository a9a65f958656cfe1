"""Writing the head: whatever the answer is, what became of the write is looked up and never guessed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import anyio
import pytest

from heeler_sync.errors import (
    AccessDeniedError,
    DamagedHeadError,
    FencedError,
    NoSuchBucketError,
    ObjectNotFoundError,
    PermanentStoreError,
    PreconditionFailedError,
    StoreError,
    TransientStoreError,
    UnfencedStoreError,
)
from heeler_sync.paths import location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.snapshot.head import Head, encode_head
from heeler_sync.snapshot.holder import Claim, Holder, acquire
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Tree, UnknownFormatError
from heeler_sync.snapshot.swap import (
    SPACING,
    EarlierWriteError,
    HeadWriter,
    OvertakenError,
    Written,
    probe,
    require_fence,
)
from heeler_sync.store.base import Condition
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS
from heeler_sync.store.retry import RetryPolicy
from tests.support.stores import IMPATIENT, Events, ScriptedStore
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

KEY = "p/.heeler/head.json"
OURS = Head("job", "run", 1, 1, "me", 0.0)


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Prefix:
    """A prefix, our writer of its head, and somebody else who may write it too."""

    def __init__(self, policy: RetryPolicy = IMPATIENT) -> None:
        self.store = ScriptedStore(MemoryStore("bucket"))
        self.layout = Layout(self.store, location("bucket", "p/"), policy)
        self.writer = HeadWriter(self.layout, wall=lambda: 77.0)

    async def other(self, over: Head | None = None) -> None:
        """Another worker takes the prefix; with `over`, it read that head before."""
        head = replace(over or OURS, epoch=2, holder="other")
        await self.store.inner.put(KEY, encode_head(head.signed(1.0)))

    async def there(self) -> Head:
        found = await Layout(self.store.inner, self.layout.location, IMPATIENT).read_head()
        assert found is not None
        return found[0]

    async def remove(self) -> None:
        await self.store.inner.delete(KEY)

    def answer(self, *answers: object) -> None:
        """What the next puts come to; see `ScriptedStore`."""
        self.store.scripts["put"] = list(answers)


@pytest.fixture
def prefix() -> Prefix:
    return Prefix()


def error(kind: type[StoreError], detail: str = "no answer in time") -> StoreError:
    return kind("PutObject", "bucket", KEY, detail)


UNCLEAR = [
    error(TransientStoreError, "no answer in time"),
    error(TransientStoreError, "429 SlowDown"),
    error(TransientStoreError, "503 ServiceUnavailable"),
    error(PreconditionFailedError, "412"),
    error(ObjectNotFoundError, "404"),
]
"""Answers that say nothing of what became of the write: a 412 may be the second of two that a library sent."""


async def test_a_write_is_signed_dated_and_read_back_as_written(prefix: Prefix) -> None:
    first = await prefix.writer.write(OURS, None)
    assert prefix.store.conditions == [Condition(if_absent=True)]
    second = await prefix.writer.write(replace(first.head, generation=1), first)
    assert prefix.store.conditions[1] == Condition(if_match=first.etag)
    found = await prefix.layout.read_head()
    assert found == (second.head, second.etag)
    assert second.head.writes[:-1] == first.head.writes
    assert second.head.written == 77.0


@pytest.mark.parametrize("answer", UNCLEAR, ids=str)
@pytest.mark.parametrize("over", [False, True], ids=["first write", "later write"])
async def test_an_unclear_answer_after_the_write_took_effect_is_a_success(
    prefix: Prefix, over: bool, answer: StoreError
) -> None:
    before = await prefix.writer.write(OURS, None) if over else None
    prefix.store.calls.clear()
    prefix.answer(("after", answer))
    written = await prefix.writer.write(replace(OURS, generation=1), before)
    assert await prefix.there() == written.head
    assert prefix.store.count("put") == 1, "it was there: writing again would be another write"
    again = await prefix.writer.write(replace(written.head, generation=2), written)
    assert (await prefix.there()).generation == again.head.generation == 2


@pytest.mark.parametrize("answer", UNCLEAR, ids=str)
@pytest.mark.parametrize("over", [False, True], ids=["first write", "later write"])
async def test_an_unclear_answer_before_any_effect_means_the_same_write_again(
    prefix: Prefix, over: bool, answer: StoreError
) -> None:
    before = await prefix.writer.write(OURS, None) if over else None
    prefix.store.calls.clear()
    prefix.answer(answer, answer)
    written = await prefix.writer.write(replace(OURS, generation=1), before)
    assert await prefix.there() == written.head
    assert prefix.store.count("put") == 3
    assert len(set(written.head.writes)) == len(written.head.writes)


async def test_a_write_that_lands_late_beside_its_repetition_is_one_write(prefix: Prefix) -> None:
    """The first is still on its way when the second is sent: the second is refused, and it was ours."""
    before = await prefix.writer.write(OURS, None)
    sent: list[bytes] = []
    put = prefix.store.inner.put

    async def remember(key: str, data: bytes, **options: object) -> str:
        sent.append(data)
        if len(sent) == 1:
            raise error(TransientStoreError)
        if len(sent) == 2:
            await put(key, sent[0])
        return await put(key, data, **options)  # type: ignore[arg-type]

    prefix.store.inner.put = remember  # type: ignore[method-assign]
    written = await prefix.writer.write(replace(OURS, generation=1), before)
    assert len(sent) == 2
    assert sent[0] == sent[1], "the repetition is the same write, by its id"
    assert await prefix.there() == written.head


@pytest.mark.parametrize("answer", [None, *UNCLEAR], ids=str)
async def test_somebody_else_who_wrote_instead_of_us_fences_us(prefix: Prefix, answer: StoreError | None) -> None:
    before = await prefix.writer.write(OURS, None)
    await prefix.other(before.head)
    prefix.answer(answer)
    with pytest.raises(OvertakenError, match="other") as caught:
        await prefix.writer.write(replace(before.head, generation=1), before)
    assert not caught.value.wrote
    assert (caught.value.epoch, caught.value.holder) == (2, "other")
    assert (await prefix.there()).holder == "other"


async def test_a_first_write_that_came_second_fences_us(prefix: Prefix) -> None:
    await prefix.other()
    with pytest.raises(FencedError):
        await prefix.writer.write(OURS, None)
    assert (await prefix.there()).holder == "other"


@pytest.mark.parametrize("answer", UNCLEAR, ids=str)
async def test_overtaken_after_our_write_took_effect_says_so(prefix: Prefix, answer: StoreError) -> None:
    """The next holder read our head and built on it: the generation counts, and we are fenced all the same."""
    before = await prefix.writer.write(OURS, None)

    put = prefix.store.inner.put

    async def then_overtaken(key: str, data: bytes, **options: object) -> str:
        await put(key, data, **options)  # type: ignore[arg-type]
        prefix.store.inner.put = put  # type: ignore[method-assign]
        await prefix.other(await prefix.there())
        raise answer

    prefix.store.inner.put = then_overtaken  # type: ignore[method-assign]
    with pytest.raises(OvertakenError) as caught:
        await prefix.writer.write(replace(before.head, generation=1), before)
    assert caught.value.wrote
    assert (await prefix.there()).generation == 1


@pytest.mark.parametrize("answer", UNCLEAR, ids=str)
async def test_a_head_that_was_deleted_while_it_was_held_is_for_a_person_to_judge(
    prefix: Prefix, answer: StoreError
) -> None:
    before = await prefix.writer.write(OURS, None)
    await prefix.remove()
    prefix.answer(answer)
    with pytest.raises(DamagedHeadError, match="repair"):
        await prefix.writer.write(replace(before.head, generation=1), before)
    assert prefix.store.objects() == {}, "it was written anew, over whatever happened there"


@pytest.mark.parametrize("kind", [AccessDeniedError, NoSuchBucketError, PermanentStoreError])
async def test_a_refusal_for_good_is_raised_as_it_is_and_not_repeated(prefix: Prefix, kind: type[StoreError]) -> None:
    before = await prefix.writer.write(OURS, None)
    prefix.store.calls.clear()
    prefix.answer(*[error(kind, "refused")] * 9)
    with pytest.raises(kind):
        await prefix.writer.write(replace(before.head, generation=1), before)
    assert prefix.store.count("put") == 1
    assert (await prefix.there()).generation == 0


async def test_a_permanent_answer_to_a_write_that_took_effect_is_a_success(prefix: Prefix) -> None:
    before = await prefix.writer.write(OURS, None)
    prefix.answer(("after", error(PermanentStoreError, "400")))
    written = await prefix.writer.write(replace(before.head, generation=1), before)
    assert await prefix.there() == written.head


async def test_a_head_that_can_not_be_read_after_an_unclear_answer_is_asked_for_until_it_can(prefix: Prefix) -> None:
    before = await prefix.writer.write(OURS, None)
    prefix.answer(("after", error(TransientStoreError)))
    prefix.store.scripts["download"] = [TransientStoreError("GetObject", "bucket", KEY, "503")] * 5
    written = await prefix.writer.write(replace(before.head, generation=1), before)
    assert await prefix.there() == written.head
    assert prefix.store.count("put") == 2


async def test_a_head_that_was_hurt_meanwhile_is_never_written_over(prefix: Prefix) -> None:
    before = await prefix.writer.write(OURS, None)
    await prefix.store.inner.put(KEY, b"{}")
    with pytest.raises(UnknownFormatError):
        await prefix.writer.write(replace(before.head, generation=1), before)
    await prefix.store.inner.put(KEY, b"half a he")
    with pytest.raises(DamagedHeadError):
        await prefix.writer.write(replace(before.head, generation=1), before)
    assert prefix.store.objects()[KEY] == b"half a he"


async def test_a_store_out_of_reach_is_given_up_after_the_patience(prefix: Prefix) -> None:
    before = await prefix.writer.write(OURS, None)
    prefix.answer(*[error(TransientStoreError)] * 100_000)
    started = anyio.current_time()
    with pytest.raises(TransientStoreError):
        await prefix.writer.write(replace(before.head, generation=1), before)
    assert anyio.current_time() - started < 10


# A write that was given up without an answer, and took effect.


async def give_up(prefix: Prefix, write: Callable[[], Awaitable[object]], *, effect: bool, reads: int = 0) -> None:
    """Write while there is no answer, with or without an effect; before it the head is read so many times."""
    silence: list[object] = [error(TransientStoreError)] * 100_000
    prefix.answer(("after", silence[0]) if effect else silence[0], *silence)
    prefix.store.scripts["download"] = [*[None] * reads, *silence]
    with pytest.raises(TransientStoreError):
        await write()
    prefix.store.scripts.clear()


async def test_an_earlier_write_of_ours_took_effect_and_another_follows_from_it(prefix: Prefix) -> None:
    before = await prefix.writer.write(OURS, None)
    await give_up(prefix, lambda: prefix.writer.write(replace(before.head, generation=1), before), effect=True)
    with pytest.raises(EarlierWriteError):
        await prefix.writer.write(replace(before.head, generation=2), before)
    found = await prefix.layout.read_head()
    assert found is not None
    assert found[0].generation == 1
    prefix.answer(error(TransientStoreError), error(PreconditionFailedError, "412"))
    written = await prefix.writer.write(replace(found[0], generation=2), Written(*found))
    assert await prefix.there() == written.head, "what we write over is no surprise, though it was ours"
    assert prefix.writer.unanswered == set()


UNORDERED = Claim("job", "run", 1, "us", ordered=False)


async def overtaken(prefix: Prefix) -> tuple[Holder, FencedError]:
    """A holder whose prefix another one took."""
    holder = await acquire(prefix.layout, UNORDERED, AlwaysPermitted(), Events())
    await acquire(Layout(prefix.store.inner, prefix.layout.location, IMPATIENT), UNORDERED, AlwaysPermitted(), Events())
    with pytest.raises(FencedError) as fenced:
        await holder.commit(Tree())
    return holder, fenced.value


async def test_a_prefix_is_taken_back_over_an_earlier_try_that_took_effect_without_an_answer(prefix: Prefix) -> None:
    holder, fenced = await overtaken(prefix)
    await give_up(prefix, lambda: holder.regain(fenced, AlwaysPermitted()), effect=True, reads=1)
    prefix.answer(error(TransientStoreError))
    await holder.regain(fenced, AlwaysPermitted())
    assert (await prefix.there()).epoch == holder.epoch == 4
    assert (await holder.commit(Tree())).generation == 1


async def test_a_prefix_is_taken_back_although_an_earlier_try_takes_effect_at_that_moment(prefix: Prefix) -> None:
    holder, fenced = await overtaken(prefix)
    sent: list[bytes] = []
    put = prefix.store.put

    async def remember(key: str, data: bytes, **options: Any) -> str:
        sent.append(data)
        return await put(key, data, **options)

    prefix.store.put = remember  # type: ignore[method-assign]
    await give_up(prefix, lambda: holder.regain(fenced, AlwaysPermitted()), effect=False, reads=1)
    earlier = sent[0]

    async def arrive() -> None:
        await prefix.store.inner.put(KEY, earlier)

    prefix.answer(arrive)
    await holder.regain(fenced, AlwaysPermitted())
    assert (await prefix.there()).epoch == holder.epoch == 4
    assert (await holder.commit(Tree())).generation == 1


async def test_a_prefix_that_can_not_be_taken_back_for_earlier_tries_is_out_of_reach(
    prefix: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, fenced = await overtaken(prefix)

    async def write(*_: object) -> Written:
        raise EarlierWriteError

    monkeypatch.setattr(HeadWriter, "write", write)
    with pytest.raises(TransientStoreError):
        await holder.regain(fenced, AlwaysPermitted())


# Spacing: R2 takes one write of a key per second.


class Times:
    """Writes, with the time at which each reached the store."""

    def __init__(self, prefix: Prefix) -> None:
        self.seen: list[float] = []
        self.put = prefix.store.inner.put
        prefix.store.inner.put = self.note  # type: ignore[method-assign]

    async def note(self, key: str, data: bytes, **options: object) -> str:
        self.seen.append(anyio.current_time())
        return await self.put(key, data, **options)  # type: ignore[arg-type]

    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.seen)]


async def test_writes_of_one_head_are_spaced_from_the_end_of_the_one_before() -> None:
    prefix = Prefix()
    times = Times(prefix)
    prefix.answer(lambda: anyio.sleep(0.5), lambda: anyio.sleep(0.5))
    written: Written | None = None
    started = anyio.current_time()
    for number in range(4):
        written = await prefix.writer.write(replace(written.head if written else OURS, generation=number), written)
    assert times.seen[0] - started < 0.6, "the first waits for nothing"
    assert min(times.gaps()) >= SPACING
    assert SPACING >= 1.0


async def test_repetitions_of_a_failed_write_are_spaced_too() -> None:
    prefix = Prefix()
    before = await prefix.writer.write(OURS, None)
    asked: list[float] = []

    async def refuse() -> None:
        asked.append(anyio.current_time())
        raise error(TransientStoreError, "429")

    prefix.answer(refuse, refuse, refuse)
    await prefix.writer.write(replace(before.head, generation=1), before)
    assert len(asked) == 3
    assert min(after - first for first, after in pairwise(asked)) >= SPACING


async def test_a_write_long_after_the_last_does_not_wait(prefix: Prefix) -> None:
    before = await prefix.writer.write(OURS, None)
    await anyio.sleep(60)
    started = anyio.current_time()
    await prefix.writer.write(replace(before.head, generation=1), before)
    assert anyio.current_time() - started < 0.01


# Without a fence.


async def test_an_unfenced_writer_sends_no_conditions() -> None:
    prefix = Prefix()
    writer = HeadWriter(prefix.layout, fenced=False)
    first = await writer.write(OURS, None)
    await writer.write(first.head, first)
    assert prefix.store.conditions == [None, None]


class Lenient(MemoryStore):
    """A store that ignores conditions, and claims to keep them."""

    async def put(self, key: str, data: bytes, **options: object) -> str:
        return await super().put(key, data)


async def test_the_probe_writes_nothing_where_conditions_are_enforced(prefix: Prefix) -> None:
    assert await probe(prefix.layout)
    assert prefix.store.objects() == {}
    assert prefix.store.count("put") == 1
    assert prefix.store.count("delete") == 0
    assert all(key.startswith("p/.heeler/") for _, key in prefix.store.calls)
    await require_fence(prefix.layout)


@pytest.mark.parametrize("answer", [PreconditionFailedError, ObjectNotFoundError])
async def test_either_way_to_say_that_a_condition_does_not_hold_will_do(
    prefix: Prefix, answer: type[StoreError]
) -> None:
    prefix.answer(error(answer))
    assert await probe(prefix.layout)


async def test_a_store_that_ignores_conditions_is_refused_and_nothing_is_left_behind() -> None:
    prefix = Prefix()
    prefix.store.inner = Lenient("bucket")
    with pytest.raises(UnfencedStoreError, match="bucket"):
        await require_fence(prefix.layout)
    assert prefix.store.objects() == {}
    assert prefix.store.count("delete") == 1


async def test_a_provider_that_is_known_to_ignore_them_is_not_even_asked() -> None:
    prefix = Prefix()
    prefix.store.inner = Lenient("bucket", PROVIDERS["rclone"])
    with pytest.raises(UnfencedStoreError):
        await require_fence(prefix.layout)
    assert prefix.store.calls == []


@pytest.mark.parametrize("answer", [error(TransientStoreError), ("after", error(TransientStoreError))], ids=repr)
@pytest.mark.parametrize("make", [MemoryStore, Lenient])
async def test_an_unclear_answer_to_the_probe_is_asked_again(
    make: Callable[[str], MemoryStore], answer: object
) -> None:
    prefix = Prefix()
    prefix.store.inner = make("bucket")
    prefix.answer(answer)
    assert await probe(prefix.layout) is (make is MemoryStore)
    assert prefix.store.objects() == {}


async def test_a_refusal_of_the_probe_is_no_verdict_on_the_store(prefix: Prefix) -> None:
    prefix.answer(error(AccessDeniedError, "403"))
    with pytest.raises(AccessDeniedError):
        await require_fence(prefix.layout)


async def _never() -> None:
    await anyio.sleep_forever()


async def test_a_cancelled_write_can_be_looked_up_and_written_over(prefix: Prefix) -> None:
    """A deadline may end a write in the middle: the next acquire finds a head that is whole."""
    before = await prefix.writer.write(OURS, None)
    script: list[Callable[[], Awaitable[None]]] = [_never]
    prefix.answer(*script)
    with anyio.move_on_after(5.0):
        await prefix.writer.write(replace(before.head, generation=1), before)
    found = await prefix.layout.read_head()
    assert found is not None
    await prefix.writer.write(replace(found[0], generation=2), Written(*found))
    assert (await prefix.there()).generation == 2
