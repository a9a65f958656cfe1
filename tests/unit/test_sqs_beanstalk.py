"""How Elastic Beanstalk's daemon forwards a message: the headers and the path, and what can't be one."""

from __future__ import annotations

import pytest

from heeler.job import InvalidJobError, Target
from heeler.sources.sqs_beanstalk import PATH, SCHEDULED, TASK, Told, body_of, target_of, told

SYSTEM = {
    "ApproximateReceiveCount": "2",
    "SenderId": "AIDA",
    "SentTimestamp": "1444225143000",
    "ApproximateFirstReceiveTimestamp": "1444225144900",
}


def said(**texts: str) -> Told:
    return told("m-1", "jobs", {}, {name.replace("__", "."): value for name, value in texts.items()})


def test_the_daemons_headers() -> None:
    assert told("m-1", "jobs", SYSTEM, {"color": "red", "weight": "1.5"}).headers == {
        "User-Agent": "aws-sqsd/2.0",
        "X-Aws-Sqsd-Msgid": "m-1",
        "X-Aws-Sqsd-Queue": "jobs",
        "X-Aws-Sqsd-Receive-Count": "2",
        "X-Aws-Sqsd-First-Received-At": "2015-10-07T13:39:04Z",
        "X-Aws-Sqsd-Sent-At": "2015-10-07T13:39:03Z",
        "X-Aws-Sqsd-Sender-Id": "AIDA",
        "X-Aws-Sqsd-Attr-color": "red",
        "X-Aws-Sqsd-Attr-weight": "1.5",
    }


def test_a_task_of_the_scheduler_has_headers_of_its_own() -> None:
    texts = {PATH: "/tasks/mail", TASK: "mail", SCHEDULED: "2015-10-07 13:39:04 UTC", "beanstalk.sqsd.other": "x"}
    headers = told("m-1", "jobs", {}, texts).headers
    assert headers == {
        "User-Agent": "aws-sqsd/2.0",
        "X-Aws-Sqsd-Msgid": "m-1",
        "X-Aws-Sqsd-Queue": "jobs",
        "X-Aws-Sqsd-Path": "/tasks/mail",
        "X-Aws-Sqsd-Taskname": "mail",
        "X-Aws-Sqsd-Scheduled-At": "2015-10-07T13:39:04Z",
    }


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2015-10-07 13:39:04 UTC", "2015-10-07T13:39:04Z"),
        ("2015-10-07T13:39:04Z", "2015-10-07T13:39:04Z"),
        ("2015-10-07T15:39:04+02:00", "2015-10-07T13:39:04Z"),
        ("2015-10-07 13:39:04", "2015-10-07T13:39:04Z"),
        ("tomorrow", "tomorrow"),
        ("0001-01-01 00:00:00+23:00", "0001-01-01 00:00:00+23:00"),
    ],
)
def test_the_moment_of_a_task(text: str, moment: str) -> None:
    assert told("m", "q", {}, {SCHEDULED: text}).headers["X-Aws-Sqsd-Scheduled-At"] == moment


@pytest.mark.parametrize("value", ["a\r\nX-Admin: 1", "a\nb", "a\0", "a\tb", "\x7f", "\ud800"])
@pytest.mark.parametrize("name", ["color", TASK, SCHEDULED, PATH])
def test_a_value_that_would_be_more_than_a_value_is_left_out_and_said(name: str, value: str) -> None:
    found = told("m", "q", {}, {name: value, "kept": "1"})
    assert value not in found.headers.values()
    assert found.headers["X-Aws-Sqsd-Attr-kept"] == "1"
    assert found.left_out == {name: "it holds a character that no header can, like the end of a line"}


@pytest.mark.parametrize("name", ["a b", "a:b", "a\r\nb", "é", ""])
def test_a_name_that_is_no_headers_is_left_out_and_said(name: str) -> None:
    found = told("m", "q", {}, {name: "1"})
    wrong = [header for header in found.headers if header.startswith("X-Aws-Sqsd-Attr-") and name]
    assert (wrong, bool(found.left_out)) == ([], bool(name))


def test_values_in_any_script_are_kept() -> None:
    assert said(city="Zürich 東京").headers["X-Aws-Sqsd-Attr-city"] == "Zürich 東京"


def test_attributes_that_no_server_has_room_for_are_left_out_and_said() -> None:
    found = said(small="1", large="x" * 60_000, other="2")
    assert found.left_out == {"large": "the headers would be too long", "other": "the headers would be too long"}
    assert found.headers["X-Aws-Sqsd-Attr-small"] == "1"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("/task", "/task"),
        ("schedule/mail", "/schedule/mail"),
        ("/", "/"),
        ("/a?b=../c", "/a?b=../c"),
        ("/ü/東", "/ü/東"),
        ("/a..b/...", "/a..b/..."),
        ("/to/http://host", "/to/http://host"),
    ],
)
def test_the_path_of_a_message(value: str, path: str) -> None:
    assert target_of({PATH: value}) == Target(None, path)


def test_a_message_that_names_no_path_goes_where_all_do() -> None:
    assert target_of({TASK: "mail"}) is None


@pytest.mark.parametrize(
    "value",
    [
        *("//host/x", "/\\host", "/%2fhost", "http://host/x", "HTTPS://host", "file:///etc"),
        *("/../x", "..", "/a/..", "/a/%2e%2E/b", "/a\\..\\b", "a/../b"),
        *("/a\r\nHost: x", "/a\0", "/\ud800"),
    ],
)
def test_what_is_no_path_of_the_app_is_refused(value: str) -> None:
    with pytest.raises(InvalidJobError) as refused:
        target_of({PATH: value})
    assert refused.value.field == PATH
    assert str(refused.value).isascii()


def test_the_placeholder_of_the_scheduler_is_not_posted_but_a_body_of_somebodys_own_is() -> None:
    assert body_of("elasticbeanstalk scheduled job", {SCHEDULED: "x"}) == ""
    assert body_of("elasticbeanstalk scheduled job", {}) == "elasticbeanstalk scheduled job"
    assert body_of("{}", {SCHEDULED: "x"}) == "{}"
