"""Which queue is meant, where it is asked, as whom; and what is said about wrong settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from heeler.config import load
from heeler.errors import UsageError
from heeler.settings import Settings
from heeler.sources import SourceRequest, guess_source, open_source
from heeler.sources.sqs import address_of

AWS = "https://sqs.eu-west-1.amazonaws.com/123456789012/jobs"
LOCAL = "http://127.0.0.1:5000/123456789012/jobs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("url", "environ", "region", "endpoint"),
    [
        (AWS, {}, "eu-west-1", None),
        (AWS, {"AWS_REGION": "us-east-2"}, "eu-west-1", None),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/q", {}, "cn-north-1", None),
        ("https://vpce-1.sqs.us-east-1.vpce.amazonaws.com/1/q", {}, "us-east-1", None),
        ("https://queue.amazonaws.com/1/q", {"SQS_AWS_REGION": "us-east-1"}, "us-east-1", None),
        (AWS, {"AWS_ENDPOINT_URL_SQS": "http://h:1", "AWS_ENDPOINT_URL": "http://x"}, "eu-west-1", "http://h:1"),
        (LOCAL, {"SQS_AWS_REGION": "x-1", "AWS_REGION": "y-1"}, "x-1", "http://127.0.0.1:5000"),
        (LOCAL, {"AWS_DEFAULT_REGION": "y-1"}, "y-1", "http://127.0.0.1:5000"),
    ],
)
def test_region_and_endpoint_follow_from_the_url_where_they_can(
    url: str, environ: dict[str, str], region: str, endpoint: str | None
) -> None:
    found = address_of(load({}, {"SQS_QUEUE_URL": url, **environ}).settings)
    assert (found.url, found.region, found.endpoint) == (url, region, endpoint)
    assert address_of(load({}, environ).settings, url) == found


def test_the_queue_has_credentials_of_its_own_and_they_are_never_shown() -> None:
    environ = {
        "SQS_QUEUE_URL": AWS,
        "SQS_AWS_ACCESS_KEY_ID": "queue-key",
        "SQS_AWS_SECRET_ACCESS_KEY": "queue-secret",
        "AWS_ACCESS_KEY_ID": "aws-key",
        "AWS_SECRET_ACCESS_KEY": "aws-secret",
        "AWS_SESSION_TOKEN": "aws-token",
    }
    configuration = load({}, environ)
    found = address_of(configuration.settings)
    assert (found.access_key_id, found.secret_access_key, found.session_token) == ("queue-key", "queue-secret", None)
    assert configuration.settings.s3_access_key_id == "aws-key"
    assert configuration.settings.s3_session_token == "aws-token"
    assert {"queue-key", "queue-secret"} <= configuration.secrets()
    for word in ("key", "secret-", "token-"):
        assert f"queue-{word}" not in repr(found) + repr(configuration.settings)
    del environ["SQS_AWS_ACCESS_KEY_ID"], environ["SQS_AWS_SECRET_ACCESS_KEY"]
    found = address_of(load({}, environ).settings)
    assert (found.access_key_id, found.session_token) == ("aws-key", "aws-token")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(), "set SQS_QUEUE_URL (or --sqs-queue-url), or --source sqs:URL"),
        (Settings(sqs_queue_url="jobs"), "SQS_QUEUE_URL (or --sqs-queue-url) is not an http or https URL"),
        (Settings(sqs_queue_url="https://u:hidden@h/1/q"), "URL without a user"),
        (Settings(sqs_queue_url=LOCAL), "set SQS_AWS_REGION (or --sqs-region)"),
        (Settings(sqs_queue_url=AWS, sqs_dlq_url="dead"), "SQS_DLQ_URL (or --sqs-dlq-url)"),
        (Settings(sqs_queue_url=AWS, sqs_endpoint="here"), "AWS_ENDPOINT_URL_SQS (or --sqs-endpoint)"),
        (Settings(sqs_queue_url=AWS, sqs_access_key_id="k"), "SQS_AWS_SECRET_ACCESS_KEY is not set"),
        (Settings(sqs_queue_url=AWS, sqs_secret_access_key="hidden"), "SQS_AWS_ACCESS_KEY_ID is not set"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_is(settings: Settings, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_source(SourceRequest("sqs", "w", Path(), settings=settings))
    assert words in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("seconds", ["0", "3601", "1.5", "soon"])
def test_a_visibility_that_sqs_would_not_take_is_refused(seconds: str) -> None:
    with pytest.raises(UsageError, match="--sqs-visibility"):
        load({"sqs_visibility": seconds}, {})


def test_a_queue_that_is_named_is_the_source_unless_a_job_is() -> None:
    environ = {"SALAD_MACHINE_ID": "m"}
    assert guess_source(environ, Settings(sqs_queue_url=AWS)) == "sqs"
    assert guess_source(environ, Settings(sqs_queue_url=AWS, job="{}")) == "once"
    assert guess_source(environ, Settings()) == "salad"
