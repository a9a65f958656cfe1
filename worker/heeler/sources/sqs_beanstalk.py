"""How Elastic Beanstalk's worker daemon forwards a message (PROTOCOLS 4), so that an app written for it runs unchanged.

No I/O here. Whatever stands in a message, a request comes out that every server can read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from urllib.parse import unquote

from heeler.job import InvalidJobError, Target

AGENT = "aws-sqsd/2.0"
"""By the name, many an app tells the daemon's requests from those of strangers."""
PATH, TASK, SCHEDULED = "beanstalk.sqsd.path", "beanstalk.sqsd.task_name", "beanstalk.sqsd.scheduled_time"
_DAEMONS = "beanstalk.sqsd"
"""Attributes whose names start so are for the daemon; it tells them in headers of their own, or not at all."""
_PLACEHOLDER = "elasticbeanstalk scheduled job"
"""The body of what the daemon's own scheduler sends, which an app never sees: JSON parsers would choke on it."""
_PREFIX = "X-Aws-Sqsd-"
_ROOM = 60_000
"""Bytes of attributes in the headers of a request: servers take 64 KiB of headers, and many less."""
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_UTC = re.compile(r"\s*(?:UTC|GMT|Z)$")
_SYSTEM = {"Receive-Count": "ApproximateReceiveCount", "Sender-Id": "SenderId"}
_TIMES = {"First-Received-At": "ApproximateFirstReceiveTimestamp", "Sent-At": "SentTimestamp"}


@dataclass(frozen=True)
class Told:
    """What an app is told with a message.

    Attributes:
        headers: By name.
        left_out: The attributes that no header can hold, and why.
    """

    headers: dict[str, str]
    left_out: dict[str, str]


def told(message_id: str, queue: str, system: Mapping[str, str], texts: Mapping[str, str]) -> Told:
    """The daemon's headers.

    Args:
        message_id: SQS's own.
        queue: Its name.
        system: The attributes that SQS keeps.
        texts: Those of the sender that are text, by name: the daemon leaves out binary ones too.
    """
    wanted = {
        "Msgid": message_id,
        "Queue": queue,
        **{header: system[name] for header, name in _SYSTEM.items() if name in system},
        **{header: _moment(float(system[name]) / 1000) for header, name in _TIMES.items() if name in system},
    }
    left_out: dict[str, str] = {}
    room = _ROOM
    for name, (header, value) in _of_sender(texts).items():
        room -= len(value)
        if why := _unfit(header, value, room):
            left_out[name] = why
        else:
            wanted[header] = value
    headers = {f"{_PREFIX}{name}": value for name, value in wanted.items()}
    return Told({"User-Agent": AGENT, **headers}, left_out)


def target_of(texts: Mapping[str, str]) -> Target | None:
    """Where the message is to be posted, if it says so.

    Raises:
        InvalidJobError: It names no path of the app.
    """
    named = texts.get(PATH)
    if named is None:
        return None
    path = named if named.startswith("/") else f"/{named}"
    plain = unquote(path.partition("?")[0]).replace("\\", "/")
    if _UNFIT.search(path):
        raise InvalidJobError(PATH, f"{named!a} holds a character that no URL can")
    if _URL.match(named) or plain.startswith("//"):
        raise InvalidJobError(PATH, f"{named!a} is the address of a host; give a path of the app, like /task")
    if ".." in plain.split("/"):
        raise InvalidJobError(PATH, f"{named!a} contains '..'")
    return Target(None, path)


def body_of(text: str, texts: Mapping[str, str]) -> str:
    """What to post: as the daemon does, nothing for a task of its scheduler."""
    return "" if SCHEDULED in texts and text == _PLACEHOLDER else text


def _of_sender(texts: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The header and its value for each of the sender's attributes that has one."""
    headers = {name: (f"Attr-{name}", value) for name, value in texts.items() if not name.startswith(_DAEMONS)}
    if PATH in texts:
        headers[PATH] = ("Path", texts[PATH])
    if TASK in texts:
        headers[TASK] = ("Taskname", texts[TASK])
    if SCHEDULED in texts:
        headers[SCHEDULED] = ("Scheduled-At", _scheduled(texts[SCHEDULED]))
    return headers


def _unfit(header: str, value: str, room: int) -> str:
    if not _NAME.fullmatch(header):
        return "its name can't be part of a header's"
    if _UNFIT.search(value):
        return "it holds a character that no header can, like the end of a line"
    return "the headers would be too long" if room < 0 else ""


def _scheduled(text: str) -> str:
    """A moment as the daemon writes it, of one as its scheduler does; anything else stays as it is."""
    try:
        moment = datetime.fromisoformat(_UTC.sub("+00:00", text.strip()))
        utc = moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)
        return _moment(utc.timestamp())
    except (ValueError, OverflowError):
        return text


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
