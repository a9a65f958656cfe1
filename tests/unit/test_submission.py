"""What is decided before a job is sent: documents split and numbered, batches, and the record that may be there."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler import desk
from heeler.documents import numbered, split_documents, with_run_id
from heeler.errors import UnavailableError, UsageError
from heeler.job import InvalidJobError, parse_document
from heeler.records.record import HOLDER_SECONDS, Record
from heeler.records.submission import Place, Wish, place
from heeler.sources.base import Desk
from heeler.sources.sqs_draft import (
    BATCH_BYTES,
    MESSAGE_BYTES,
    Draft,
    batches,
    check_group,
    draft_of_document,
    draft_of_message,
    refuse_doubles,
    refuse_large,
)
from heeler.sources.sqs_limits import QueueLimits
from heeler.sources.sqs_message import Message

WISH = Wish("a", "", "d", fresh=False, now=1000.0, expires=5000.0)
PENDING = Record("a", "", "pending", 900.0, digest="d", expires=4000.0)
FRESH = replace(WISH, run_id="fresh-2", fresh=True)

FIELDS = st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3)


def document(**fields: Any) -> bytes:
    return json.dumps({"command": "x", **fields}).encode()


# Documents.


@given(st.lists(st.none() | st.from_regex("[a-z]{1,5}", fullmatch=True), min_size=1, max_size=4), st.integers(1, 9))
def test_an_array_has_each_document_so_often_with_an_index_and_an_id_of_its_own(
    ids: list[str | None], count: int
) -> None:
    made = iter(f"made{number}" for number in range(9))
    bodies = [document(**({} if job_id is None else {"id": job_id}), timeout=5) for job_id in ids]
    found = [parse_document(body) for body in numbered(bodies, count, lambda: next(made))]
    assert len(found) == len(ids) * count
    for number, job in enumerate(found):
        assert job.index == number % count
        assert job.id is not None
        base, _, end = job.id.rpartition("-")
        assert end == str(job.index)
        wanted = ids[number // count]
        assert base == wanted if wanted is not None else base.startswith("made")
        assert job.timeout == 5


@pytest.mark.parametrize("body", [b"nonsense", b"[1]", b'{"id": 5, "command": "x"}', b"[" * 100_000])
def test_what_is_no_document_is_left_to_be_refused_by_name(body: bytes) -> None:
    assert numbered([body], 3, lambda: "x") == [body]
    assert body.startswith(b"{") or with_run_id(body, "r") == body
    with pytest.raises(InvalidJobError):
        parse_document(body)


def test_an_array_refuses_a_document_that_has_an_index() -> None:
    with pytest.raises(InvalidJobError, match="index: is there already"):
        numbered([document(index=0)], 2, lambda: "x")
    assert len(numbered([document(index=None)], 2, lambda: "x")) == 2


def test_a_text_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(UsageError, match="nested too deeply"):
        split_documents("[" * 200_000)


# Drafts.


def test_a_document_gets_an_id_and_keeps_every_other_word() -> None:
    draft, _ = draft_of_document(document(environment={"A": "\u20ac\U0001f600"}))
    assert len(draft.id) == 16
    assert not draft.named
    assert json.loads(draft.text) == {"command": "x", "environment": {"A": "\u20ac\U0001f600"}, "id": draft.id}
    assert "\u20ac" in draft.text


def test_what_sqs_does_not_take_is_escaped_in_a_document_and_refused_in_a_message() -> None:
    draft, _ = draft_of_document(document(environment={"A": "\ufffe"}))
    assert "\\ufffe" in draft.text
    for body, words in [(b"a\xff", "not UTF-8"), (b"a\0", "U\\+0000"), ("\ufffe".encode(), "U\\+FFFE"), (b"", "empty")]:
        with pytest.raises(InvalidJobError, match=words):
            draft_of_message(body)


@given(FIELDS, st.sampled_from(["", "r1", "fresh-1"]), st.sampled_from(["", "r1", "fresh-2"]))
def test_a_digest_tells_documents_apart_and_not_runs(fields: dict[str, Any], run: str, other: str) -> None:
    draft = Draft("a", run, named=True, text="", document={"environment": fields, "run_id": run})
    assert draft.in_run(other).digest == draft.digest
    assert replace(draft, document={"environment": {**fields, "more": 1}}).digest != draft.digest


@given(st.text(max_size=50), st.text(max_size=50))
def test_a_digest_tells_messages_apart(one: str, other: str) -> None:
    digests = {Draft("a", "", named=True, text=text).digest for text in (one, other)}
    assert len(digests) == len({one, other})


def test_the_id_of_a_message_is_that_which_a_worker_reads_from_it() -> None:
    for body in (b"hello", b"{}", document(), document(id="own")):
        draft = draft_of_message(body)
        sent = draft.message(fifo=False, group=None)
        read = Message.of(
            {
                "MessageId": "m",
                "ReceiptHandle": "h",
                "Body": sent["MessageBody"],
                "MessageAttributes": sent.get("MessageAttributes", {}),
            },
            0.0,
        )
        assert read.job_id == draft.id
        assert read.text.encode() == body


@given(st.lists(st.integers(0, 400_000), max_size=40))
def test_batches_hold_all_in_order_and_keep_both_limits(sizes: list[int]) -> None:
    drafts = [Draft(str(number), "", named=True, text="") for number in range(len(sizes))]
    for draft, size in zip(drafts, sizes, strict=True):
        draft.__dict__["size"] = size
    found = [*batches(drafts)]
    assert [draft for batch in found for draft in batch] == drafts
    for batch in found:
        assert 1 <= len(batch) <= 10
        assert len(batch) == 1 or sum(draft.size for draft in batch) <= BATCH_BYTES
    for batch, following in itertools.pairwise(found):
        assert len(batch) == 10 or sum(draft.size for draft in [*batch, following[0]]) > BATCH_BYTES


def test_a_draft_is_as_large_as_sqs_counts_it_and_a_byte_too_many_is_refused_by_name() -> None:
    draft = Draft("a", "", named=True, text="\u20ac", attributes={"heeler-job-id": "abc"})
    assert draft.size == 3 + 13 + 6 + 3
    refuse_large([draft], 25)
    with pytest.raises(InvalidJobError, match="message: job 'a' has 25 bytes, and the queue takes 24"):
        refuse_large([draft], 24)
    refuse_large([Draft("b", "", named=True, text="x" * MESSAGE_BYTES)])
    with pytest.raises(InvalidJobError, match="document: job 'b' has 1048577 bytes, and the queue takes 1048576"):
        refuse_large([Draft("b", "", named=True, text="x" * (MESSAGE_BYTES + 1), document={})])


def test_two_jobs_of_one_id_are_refused() -> None:
    one = Draft("a", "", named=True, text="")
    with pytest.raises(InvalidJobError, match="'a' is there twice"):
        refuse_doubles([one, replace(one, text="other")])


def test_groups_and_deduplication_of_a_fifo_queue() -> None:
    long = Draft("x" * 200, "", named=True, text="t")
    for draft, group in ((Draft("a", "", named=True, text="t"), "a"), (long, None)):
        sent = draft.message(fifo=True, group=None)
        assert group in (None, sent["MessageGroupId"])
        assert len(sent["MessageGroupId"]) <= 128
        assert len(sent["MessageDeduplicationId"]) <= 128
    assert long.message(fifo=True, group="g")["MessageGroupId"] == "g"
    ids = {replace(long, run_id=run).message(fifo=True, group=None)["MessageDeduplicationId"] for run in ("", "r")}
    assert len(ids) == 2


@pytest.mark.parametrize("group", ["", "x" * 129, "a b", "caf\u00e9"])
def test_a_group_that_sqs_does_not_take_is_refused(group: str) -> None:
    with pytest.raises(UsageError, match="--group is"):
        check_group(group, fifo=True)
    with pytest.raises(UsageError, match="leave it out"):
        check_group(group, fifo=False)
    check_group("a!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~Z9", fifo=True)
    check_group(None, fifo=False)


# Records.


def test_a_job_without_a_record_gets_one_and_is_sent() -> None:
    record = Record("a", "", "pending", 1000.0, digest="d", expires=5000.0)
    assert place(None, WISH) == Place("", send=True, record=record)


def test_the_same_job_is_sent_again_only_if_its_message_may_be_missing() -> None:
    assert place(PENDING, WISH) == Place("", send=True, known="pending")
    taken = PENDING.taken("w", "m", 950.0, 4000.0)
    assert place(taken, WISH) == Place("", send=False, known="running")
    assert place(taken.retried(960.0, "x"), WISH) == Place("", send=False, known="pending")
    for ended in (taken.done(990.0, None, "", ""), taken.failed(990.0, "x", None, "", ""), PENDING.cancelled(990.0)):
        assert place(ended, WISH) == Place("", send=False, known=ended.state)


def test_a_job_whose_message_the_queue_has_dropped_is_sent_again_unless_somebody_still_has_it() -> None:
    taken = PENDING.taken("w", "m", 950.0, 980.0)
    assert not place(taken, WISH).send
    late = replace(WISH, now=950.0 + HOLDER_SECONDS + 1)
    assert place(taken, late) == Place("", send=True, known="running", record=replace(taken, expires=5000.0))
    released = taken.released(960.0, "drain", fruitless=False)
    assert place(released, WISH) == Place("", send=True, known="pending", record=replace(released, expires=5000.0))


def test_another_document_of_the_same_id_is_refused_whatever_became_of_the_first() -> None:
    other = replace(WISH, digest="other")
    for record in (PENDING, PENDING.taken("w", "m", 950.0), PENDING.cancelled(950.0)):
        with pytest.raises(InvalidJobError, match="'a' is in the queue already with another document; choose another"):
            place(record, other)
    with pytest.raises(InvalidJobError, match="'a' is in the queue already; choose another"):
        place(replace(PENDING, digest=""), WISH)


def test_another_run_begins_once_the_former_has_ended() -> None:
    taken = PENDING.taken("w", "m", 950.0)
    for record in (PENDING, taken):
        with pytest.raises(InvalidJobError, match=f"{record.state} in another run"):
            place(record, FRESH)
    for digest in ("d", "other"):
        found = place(taken.done(990.0, {"exit_code": 0}, "key", "sent"), replace(FRESH, digest=digest))
        assert found.send
        assert found.record is not None
        assert found.record == Record(
            "a", "fresh-2", "pending", 1000.0, digest=digest, attempts=1, expires=5000.0, history=found.record.history
        )


def test_a_fresh_run_that_is_submitted_again_is_the_one_that_was_begun() -> None:
    begun = replace(PENDING, run_id="fresh-1")
    assert place(begun, FRESH) == Place("fresh-1", send=True, known="pending")
    assert place(begun.taken("w", "m", 950.0), FRESH) == Place("fresh-1", send=False, known="running")
    with pytest.raises(InvalidJobError, match="in another run"):
        place(begun, replace(FRESH, digest="other"))
    with pytest.raises(InvalidJobError, match="in another run"):
        place(begun, WISH)


# Waiting.


class SilentDesk:
    """Answers as it is told to."""

    pace = (1.0, 5.0)

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[list[str]] = []

    def look(self, ids: list[str]) -> dict[str, Any]:
        self.asked.append(list(ids))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {name: SimpleNamespace(state=state) for name, state in answer.items()}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, in no time."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(pauses))
    return pauses


def test_who_waits_asks_only_for_what_goes_on_and_ever_less_often(
    slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = UnavailableError("storage is out of reach")
    going = {"a": "running", "b": "pending"}
    queue = SilentDesk([going, out, {"a": "done", "b": "running"}, *[{"b": "running"}] * 10, {"b": "done"}])
    assert desk._wait(cast("Desk", queue), ["a", "b"]) == 0
    assert queue.asked == [["a", "b"]] * 3 + [["b"]] * 11
    assert capsys.readouterr().err == "a done\nb done\n"
    assert slept[:2] == [1.0, 1.2]
    assert slept[-1] == 5.0


@pytest.mark.parametrize("end", [{"a": "failed"}, {"a": "cancelled"}, {}])
def test_who_waits_is_told_what_did_not_end_well(slept: list[float], end: dict[str, str]) -> None:
    assert desk._wait(cast("Desk", SilentDesk([end])), ["a"]) == 1


def test_who_waits_is_told_in_the_end_that_nothing_answers(slept: list[float]) -> None:
    with pytest.raises(UnavailableError, match="out of reach"):
        desk._wait(cast("Desk", SilentDesk([UnavailableError("out of reach")] * 1000)), ["a"])
    assert 600 < sum(slept) < 610


# Notes.


def test_notes_say_what_a_queue_does_to_messages() -> None:
    assert QueueLimits().notes(0.0) == []
    policy, retention = QueueLimits(retention=4 * 86_400.0, receives=1, moved_to="dead").notes(0.0)
    assert policy == (
        "this queue's redrive policy moves a message to dead after 1 receive;"
        " an interruption and every 12 hours of a job count as a receive"
    )
    assert retention.startswith(
        "this queue drops messages after 4 days, whoever works on them: a job must end before 1970-01-0"
    )
    assert "after 90 minutes" not in QueueLimits(retention=5400.0).notes(0.0)[0]
    assert "after 1.5 hours" in QueueLimits(retention=5400.0).notes(0.0)[0]
    assert "after 1 minute," in QueueLimits(retention=60.0).notes(0.0)[0]
