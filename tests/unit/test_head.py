"""The head: what goes in comes out, and what storage may hold instead is refused in words of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from heeler_sync.errors import DamagedHeadError, FencedError
from heeler_sync.paths import location
from heeler_sync.snapshot.head import Head, Kept, decode_head, encode_head
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import UnknownFormatError
from heeler_sync.snapshot.swap import fenced_by
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import IMPATIENT

words = st.text(max_size=20)
numbers = st.integers(0, 2**53)
times = st.floats(0, 4e9)
results = st.dictionaries(words, st.one_of(st.none(), st.booleans(), st.integers(), words, st.lists(words, max_size=2)))


@st.composite
def heads(draw: st.DrawFn) -> Head:
    generations = sorted(draw(st.sets(st.integers(1, 10**6), max_size=4)))
    kept = tuple(
        Kept(
            number, draw(words), new_id(draw(st.integers(1, 999))), "0" * 64, draw(times), draw(numbers), draw(numbers)
        )
        for number in generations
    )
    head = Head(
        job_id=draw(words),
        run_id=draw(words),
        attempt=draw(st.integers(0, 10**6)),
        epoch=draw(st.integers(1, 10**9)),
        holder=draw(words),
        acquired=draw(times),
        generation=(generations or [0])[-1] + draw(st.integers(0, 3)),
        kept=kept,
        adopted=tuple(new_id(7) for _ in range(draw(st.integers(0, 3)))),
        status=draw(st.sampled_from(["open", "complete"])),
        result=draw(st.one_of(st.none(), results)),
        failures=draw(st.integers(0, 99)),
        interruptions=draw(st.integers(0, 99)),
    )
    return head.signed(draw(times))


@settings(max_examples=100, deadline=None)
@given(heads())
def test_any_head_makes_the_round_trip(head: Head) -> None:
    assert decode_head(encode_head(head)) == head


def test_each_write_has_an_id_of_its_own_and_the_last_few_are_kept() -> None:
    head = HEAD
    seen = [head.writes[-1]]
    for _ in range(20):
        head = head.signed(1.0)
        seen.append(head.writes[-1])
    assert len(set(seen)) == 21
    assert head.writes == tuple(seen[-8:])


HEAD = Head(
    "job",
    "run",
    2,
    3,
    "me",
    5.0,
    7,
    (Kept(6, "run", new_id(2), "0" * 64, 1.0, 1, 1), Kept(7, "run", new_id(3), "0" * 64, 1.0, 1, 1)),
).signed(9.0)


def document(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode_head(HEAD))
    return {**found, **changes}


def kept(**changes: Any) -> dict[str, Any]:
    return {**document()["kept"][0], **changes}


def shown(changes: dict[str, Any]) -> str:
    """The id of a test: the names of manifests are others in each process, and all have to collect the same."""
    return repr(changes).replace(HEAD.kept[0].manifest, "MANIFEST")


@pytest.mark.parametrize("found", [2, 0, None, "1", 1.5, [1]])
def test_an_unknown_format_is_said_to_be_one_and_is_no_damage(found: object) -> None:
    with pytest.raises(UnknownFormatError, match="newer heeler"):
        decode_head(json.dumps(document(format=found)).encode())


def test_a_head_of_a_newer_format_is_refused_whatever_else_is_in_it() -> None:
    with pytest.raises(UnknownFormatError):
        decode_head(b'{"format": 2, "all": "new"}')


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0},
        {"epoch": "3"},
        {"epoch": True},
        {"epoch": None},
        {"attempt": 1.5},
        {"generation": -1},
        {"generation": 6},
        {"job_id": 7},
        {"job_id": None},
        {"status": "done"},
        {"status": None},
        {"result": []},
        {"result": "x"},
        {"acquired": "now"},
        {"kept": None},
        {"kept": 7},
        {"kept": [7]},
        {"kept": [[]]},
        {"kept": [{}]},
        {"kept": [kept(extra=1)]},
        {"kept": [kept(generation=0)]},
        {"kept": [kept(generation="6")]},
        {"kept": [kept(manifest="../x")]},
        {"kept": [kept(manifest="")]},
        {"kept": [kept(manifest=7)]},
        {"kept": [kept(digest=7)]},
        {"kept": [kept(), kept()]},
        {"kept": [kept(generation=7), kept(generation=6)]},
        {"adopted": ["../x"]},
        {"adopted": [7]},
        {"adopted": None},
        {"writes": []},
        {"writes": [7]},
        {"writes": None},
        {"unknown": 1},
    ],
    ids=shown,
)
def test_what_can_not_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        decode_head(json.dumps(document(**changes)).encode())


@pytest.mark.parametrize("part", sorted(set(document()) - {"format"}))
def test_a_head_without_one_of_its_parts_is_none_if_the_part_matters(part: str) -> None:
    found = document()
    del found[part]
    try:
        head = decode_head(json.dumps(found).encode())
    except ValueError:
        return
    assert part in {"generation", "status", "result", "failures", "interruptions", "written"}
    assert head.epoch == 3


def refuse_or_take(data: bytes) -> None:
    try:
        head = decode_head(data)
    except (UnknownFormatError, ValueError):
        return
    assert decode_head(encode_head(head)).writes == head.writes


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 100_000)
@example(b"1" * 10_000)
@example(b"\xff")
def test_arbitrary_bytes_are_refused_in_our_own_words(data: bytes) -> None:
    refuse_or_take(data)


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.one_of(st.none(), st.integers(0, 10**6)))
def test_damaged_bytes_are_refused_in_our_own_words(at: int, value: int, cut: int | None) -> None:
    data = bytearray(encode_head(HEAD))
    data[at % len(data)] = value
    refuse_or_take(bytes(data[: None if cut is None else cut % len(data)]))


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_heads_with_anything_in_any_place_are_refused_in_our_own_words(data: st.DataObject) -> None:
    found: Any = document(adopted=[new_id(3)])
    place: Any = found
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], list | dict) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(anything)
            break
        place = place[key]
    refuse_or_take(json.dumps(found).encode())


@pytest.mark.parametrize("since", [float("inf"), float("nan"), 1e300, -1e300, 10**300])
def test_a_head_whose_times_no_clock_can_show_does_not_hide_who_holds_it(since: float) -> None:
    """The time is for people: it must not turn "fenced" into an error of the calendar."""
    data = json.dumps(document(acquired=since)).encode()
    layout = Layout(MemoryStore("bucket"), location("bucket", "p/"), IMPATIENT)
    try:
        head = decode_head(data)
    except ValueError:
        return
    assert isinstance(fenced_by(layout, head), FencedError)


def test_the_error_of_a_damaged_head_says_what_to_run() -> None:
    error = DamagedHeadError("s3://b/p/", "the head is gone")
    assert "heeler sync repair s3://b/p/" in str(error)
    assert error.location == "s3://b/p/"


def test_a_head_speaks_of_one_run_of_one_job() -> None:
    assert HEAD.is_of("job", "run")
    assert not HEAD.is_of("job", "other")
    assert not HEAD.is_of("other", "run")
    assert replace(HEAD, status="complete").complete
    assert not HEAD.complete
