"""A job of Kelpie's API as a job document: Kelpie's fields, the older six, and ours within its environment."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.job import InvalidJobError, Job
from heeler.local.kelpie_model import Submission
from heeler.message import of_kelpie_document
from heeler.settings import Settings
from heeler.sources.base import SourceUnavailableError
from heeler.sources.kelpie_job import DOCUMENT_VARIABLE, Row, document_of, job_of

SETTINGS = Settings()
SNAPSHOTS = Settings(kelpie_snapshots=True)
SIX: dict[str, Any] = {
    f"{part}_{name}": value
    for part in ("input", "checkpoint", "output")
    for name, value in (("bucket", "lab"), ("prefix", f"{part}/"))
}


def row(**fields: Any) -> Row:
    """As the API shows a submission."""
    shown = Submission.model_validate({"command": "run", "container_group_id": "g", **fields}).fields()
    return raw(**shown)


def raw(**fields: Any) -> Row:
    return Row.of({"id": "job-1", "status": "running", "machine_id": "m", "started": "2024-04-19 18:53:31", **fields})


def sync_of(settings: Settings | None = None, **fields: Any) -> dict[str, Any]:
    sync: dict[str, Any] = document_of(row(**fields), settings or SETTINGS)["sync"]
    return sync


def added(document: object, **fields: Any) -> Row:
    text = document if isinstance(document, str) else json.dumps(document)
    return row(environment={"A": "1", DOCUMENT_VARIABLE: text}, **fields)


# Rows.


def test_a_row_tells_whose_the_job_is() -> None:
    found = raw(num_failures=2, heartbeat_interval=7)
    assert (found.id, found.status, found.machine_id) == ("job-1", "running", "m")
    assert (found.failures, found.interval) == (2, 7.0)
    assert "command" not in repr(raw(environment={"KEY": "secret"}, command="x"))
    assert "secret" not in repr(raw(environment={"KEY": "secret"}))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "job",
        {},
        {"id": "a"},
        {"id": None, "status": "running"},
        {"id": 5, "status": "running"},
        {"id": "../../etc/passwd", "status": "running"},
        {"id": "a/b", "status": "running"},
        {"id": "", "status": "running"},
        {"id": "a" * 201, "status": "running"},
        {"id": "a", "status": "running", "num_failures": "many"},
        {"id": "a", "status": "running", "num_failures": float("inf")},
        {"id": "a", "status": "running", "heartbeat_interval": [1]},
    ],
    ids=repr,
)
def test_what_is_no_job_is_said_to_be_none(data: object) -> None:
    with pytest.raises(SourceUnavailableError, match="a job that is none"):
        Row.of(data)


@pytest.mark.parametrize(("told", "interval"), [(None, 30.0), (0, 30.0), (-5, 0.1), (1, 1.0), (float("nan"), 0.1)])
def test_an_interval_is_never_nothing(told: object, interval: float) -> None:
    assert raw(heartbeat_interval=told).interval == interval


# Kelpie's fields.


def test_a_job_is_the_document_of_its_command() -> None:
    job = job_of(row(arguments=["a"], environment={"A": "1"}, compression=True), SETTINGS)
    document = job.document()
    assert (document.id, document.command, document.arguments) == ("job-1", "run", ("a",))
    assert (dict(document.environment), document.compression) == ({"A": "1"}, True)


def test_a_sync_is_taken_as_it_is_and_the_older_fields_are_not_looked_at() -> None:
    entry = {"bucket": "lab", "prefix": "p", "local_path": "/l", "direction": "upload", "pattern": r"\.pt$"}
    sync = sync_of(sync={"during": [entry]}, **SIX)
    assert sync == {"during": [{**entry, "prefix": "p/"}]}
    assert sync_of(sync={}, **SIX) == {}


def test_nulls_in_a_sync_are_what_was_left_out() -> None:
    entry = {"bucket": "lab", "prefix": "p/", "local_path": "/l", "direction": None, "pattern": None}
    told = raw(command="run", sync={"before": [entry], "during": None})
    assert document_of(told, SETTINGS)["sync"] == {"before": [{"bucket": "lab", "prefix": "p/", "local_path": "/l"}]}
    assert of_kelpie_document(job_of(told, SETTINGS)).sync.before[0].pattern is None


# The older six.


def test_the_older_six_are_what_kelpies_own_worker_does_with_them() -> None:
    def entry(part: str, **more: Any) -> dict[str, Any]:
        return {"bucket": "lab", "prefix": f"{part}/", "local_path": f"/{part}", **more}

    assert sync_of(**SIX) == {
        "before": [entry("input"), entry("checkpoint")],
        "during": [entry("checkpoint"), entry("output", deletes=False)],
        "after": [entry("output")],
    }


@pytest.mark.parametrize("place", ["/data", "/data/", "/data/./"])
def test_where_checkpoints_and_outputs_share_a_folder_it_is_kept_once_while_the_program_runs(place: str) -> None:
    settings = Settings(checkpoint_dir="/data", output_dir=place)
    sync = sync_of(settings, **SIX)
    assert [entry["prefix"] for entry in sync["during"]] == ["checkpoint/"]
    assert [entry["prefix"] for entry in sync["after"]] == ["output/"]
    alone = {name: value for name, value in SIX.items() if not name.startswith("checkpoint")}
    assert [entry["prefix"] for entry in sync_of(settings, **alone)["during"]] == ["output/"]


@pytest.mark.parametrize("missing", sorted(SIX))
def test_a_bucket_without_a_prefix_or_a_prefix_without_a_bucket_is_no_folder(missing: str) -> None:
    part = missing.partition("_")[0]
    told = {name: value for name, value in SIX.items() if name != missing}
    prefixes = {entry["prefix"] for entries in sync_of(**told).values() for entry in entries}
    assert prefixes == {"input/", "checkpoint/", "output/"} - {f"{part}/"}


# Our own fields.


def test_ours_are_taken_from_a_variable_that_the_program_does_not_see() -> None:
    entry = {"bucket": "lab", "prefix": "p", "local_path": "/l", "mode": "snapshot", "ready": "done"}
    told = {"timeout": 5, "run_id": "r", "index": 3, "sync": {"before": [entry], "during": [entry]}}
    document = job_of(added(told, **SIX), SETTINGS).document()
    assert dict(document.environment) == {"A": "1"}
    assert (document.timeout, document.run_id, document.index) == (5.0, "r", 3)
    assert document.sync.during[0].ready == "done"
    assert document.sync.after == ()


@pytest.mark.parametrize(
    ("told", "where"),
    [
        ("", "environment.HEELER_DOCUMENT"),
        ("{", "environment.HEELER_DOCUMENT"),
        ("[]", "environment.HEELER_DOCUMENT"),
        ("null", "environment.HEELER_DOCUMENT"),
        ("[" * 100_000, "environment.HEELER_DOCUMENT"),
        ({"command": "rm"}, "environment.HEELER_DOCUMENT.command"),
        ({"id": "other"}, "environment.HEELER_DOCUMENT.id"),
        ({"environment": {}}, "environment.HEELER_DOCUMENT.environment"),
        ({"max_failures": 1}, "environment.HEELER_DOCUMENT.max_failures"),
        ({"timeout": "soon"}, "timeout"),
        ('{"timeout": NaN}', "timeout"),
        ({"index": -1}, "index"),
        ({"sync": None}, "sync"),
        ({"sync": 5}, "sync"),
        ({"sync": {"before": 5}}, "sync.before"),
        ({"sync": {"before": [5]}}, "sync.before.0"),
        ({"sync": {"never": []}}, "sync.never"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("settings", [SETTINGS, SNAPSHOTS], ids=["as it is", "snapshots"])
def test_a_wrong_one_fails_the_job_and_is_named(told: object, where: str, settings: Settings) -> None:
    job = job_of(added(told), settings)
    with pytest.raises(InvalidJobError) as caught:
        of_kelpie_document(job)
    assert caught.value.field == where
    assert job.id == "job-1"


@pytest.mark.parametrize("depth", [10, 300, 900, 950, 980, 990, 1000, 100_000])
def test_a_document_nested_however_deeply_fails_the_job_alone(depth: int) -> None:
    job = job_of(added('{"sync": ' + "[" * depth + "]" * depth + "}"), SNAPSHOTS)
    with pytest.raises(InvalidJobError):
        job.document()


# Snapshots.


def entry(prefix: str = "c/", path: str = "/c", **more: Any) -> dict[str, Any]:
    return {"bucket": "lab", "prefix": prefix, "local_path": path, "direction": "upload", **more}


def down(prefix: str = "c/", path: str = "/c", **more: Any) -> dict[str, Any]:
    return {**entry(prefix, path, **more), "direction": "download"}


def chosen(before: list[dict[str, Any]], during: list[dict[str, Any]], after: list[dict[str, Any]]) -> set[str]:
    sync = sync_of(SNAPSHOTS, sync={"before": before, "during": during, "after": after})
    assert not any("mode" in one for one in sync["after"])
    modes = {part: {one["prefix"] for one in sync[part] if one.get("mode") == "snapshot"} for part in sync}
    assert modes["before"] == modes["during"], "both or none"
    return modes["during"]


@pytest.mark.parametrize("path", ["/c", "/c/", "/c/."])
def test_a_folder_that_is_restored_and_kept_becomes_a_snapshot_where_that_is_wanted(path: str) -> None:
    assert chosen([down()], [entry(path=path)], []) == {"c/"}
    assert sync_of(SETTINGS, sync={"before": [down()], "during": [entry()]})["during"] == [entry()]


def test_the_older_checkpoint_becomes_one_and_nothing_else() -> None:
    sync = sync_of(SNAPSHOTS, **SIX)
    modes = {part: {one["prefix"]: one.get("mode") for one in entries} for part, entries in sync.items()}
    assert modes == {
        "before": {"input/": None, "checkpoint/": "snapshot"},
        "during": {"checkpoint/": "snapshot", "output/": None},
        "after": {"output/": None},
    }


@pytest.mark.parametrize(
    ("before", "during", "after"),
    [
        ([], [entry()], []),
        ([down()], [], []),
        ([down()], [entry(pattern="x")], []),
        ([down(pattern="x")], [entry()], []),
        ([down()], [entry(), entry()], []),
        ([down(), down()], [entry()], []),
        ([down(), down(pattern="x")], [entry()], []),
        ([down()], [entry(), entry("other/")], []),
        ([down()], [entry(), entry("other/", "/c/below")], []),
        ([down()], [entry(), entry("c/below/", "/other")], []),
        ([down(), down("in/", "/c/in")], [entry()], []),
        ([down(), down("c/in/", "/in")], [entry()], []),
        ([down("", "/c")], [entry("", "/c"), entry("o/", "/o")], []),
        ([down()], [entry()], [entry("c/", "/out")]),
        ([down()], [entry()], [entry("c/out/", "/out")]),
        ([down(path="/other")], [entry()], []),
        ([down("other/")], [entry()], []),
    ],
)
def test_what_is_a_part_or_shares_its_place_stays_as_it_is(
    before: list[dict[str, Any]], during: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    assert chosen(before, during, after) == set()


def test_folders_beside_it_do_not_matter() -> None:
    assert chosen([down(), down("in/", "/in")], [entry(), entry("o/", "/o")], [entry("o/", "/c")]) == {"c/"}
    assert chosen([down(), down("cc/", "/cc")], [entry()], []) == {"c/"}


@pytest.mark.parametrize("part", ["before", "during"])
def test_a_mode_that_the_job_names_is_kept(part: str) -> None:
    sync = {"before": [down()], "during": [entry()]}
    sync[part] = [{**sync[part][0], "mode": "mirror"}]
    found = document_of(added({"sync": sync}), SNAPSHOTS)["sync"]
    assert [one.get("mode") for one in found[part]] == ["mirror"]
    assert [one.get("mode") for one in found["before"] + found["during"]].count("snapshot") == 0


# All that the API takes.

_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
_paths = st.sampled_from(["/a", "/a/b", "relative", "/c/", "/with space", "/ä"])
_prefixes = st.sampled_from(["", "a", "a/", "a/b", "{job_id}/", "ä/"])
_buckets = st.sampled_from(["bucket", "my.bucket-1"])


def _entries(direction: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.fixed_dictionaries(
        {"bucket": _buckets, "prefix": _prefixes, "local_path": _paths, "direction": st.just(direction)},
        optional={"pattern": st.sampled_from([r"\.pt$", "^model", "(?:a|b)", "x{2}"])},
    )
    return st.lists(one, max_size=3)


_sync = st.fixed_dictionaries(
    {}, optional={"before": _entries("download"), "during": _entries("upload"), "after": _entries("upload")}
)
_submissions = st.fixed_dictionaries(
    {"command": _text.filter(bool), "container_group_id": st.just("g")},
    optional={
        "arguments": st.lists(_text, max_size=3),
        "environment": st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True), _text, max_size=3),
        "max_failures": st.integers(1, (1 << 53) - 1),
        "heartbeat_interval": st.integers(1, (1 << 53) - 1),
        "webhook": _text,
        "compression": st.booleans(),
        "sync": _sync,
        **{f"{part}_bucket": _buckets for part in ("input", "checkpoint", "output")},
        **{f"{part}_prefix": _prefixes for part in ("input", "checkpoint", "output")},
    },
)


@given(_submissions, st.booleans())
def test_a_job_that_the_api_takes_is_one_for_us(submission: dict[str, Any], snapshots: bool) -> None:
    job: Job = job_of(row(**submission), Settings(kelpie_snapshots=snapshots))
    document = job.document()
    assert document.command == submission["command"]
    assert document.arguments == tuple(submission.get("arguments", ()))
    assert dict(document.environment) == submission.get("environment", {})
    wanted = of_kelpie_document(job)
    assert wanted.standard
    for part, entries in submission.get("sync", {}).items():
        found = getattr(wanted.sync, part)
        assert [(one.bucket, one.local_path) for one in found] == [(e["bucket"], e["local_path"]) for e in entries]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"command": ""}, "command"),
        ({"command": "a\0b"}, "command"),
        ({"environment": {"MY-NAME": "x"}}, "environment"),
        ({"environment": {"A": "a\0b"}}, "environment.A"),
        ({"sync": {"before": [entry()]}}, "sync"),
        ({"sync": {"during": [entry(path="")]}}, "sync.during.0.local_path"),
        ({"sync": {"during": [entry("../up/")]}}, "sync.during.0.prefix"),
        ({"sync": {"during": [entry(pattern="(a+)+")]}}, "sync.during.0.pattern"),
        ({"input_bucket": "no bucket!", "input_prefix": "p"}, "sync.before.0.bucket"),
    ],
)
def test_what_the_api_takes_and_we_do_not_is_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        job_of(row(**fields), SETTINGS).document()
    assert caught.value.field == where
