"""Gathers settings: flags before environment before file before defaults, each value with its origin."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from heeler.errors import UsageError
from heeler.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "HEELER_"
MASK = "********"


_USER_IN_URL = re.compile(r"//.*@")
_SERVICE_LINK = re.compile(
    r"HEELER_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)", re.ASCII
)
"""What Kubernetes tells every container of a namespace that has a service named heeler."""

_NOT_SETTINGS = {
    "HEELER_CONFIG",
    # What we tell the program: a heeler started by a job of another must not stumble over them.
    *(
        f"HEELER_{name}"
        for name in (
            "JOB_ID",
            "JOB_INDEX",
            "ATTEMPT",
            "INPUT_DIR",
            "CHECKPOINT_DIR",
            "OUTPUT_DIR",
            "PROCESS_TAG",
            "CONTROL_URL",
        )
    ),
}


def _default_state_dir() -> str:
    if os.geteuid() == 0:
        return "/var/lib/heeler"
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return str(Path(base).expanduser() / "heeler")


@dataclass(frozen=True)
class Configuration:
    """The settings and where each came from ("flag --x", "environment X", "file F", "default")."""

    settings: Settings
    origins: Mapping[str, str]

    def table(self) -> Iterator[tuple[str, str, str]]:
        """Name, value with secrets masked, and origin of every setting."""
        for entry in fields(Settings):
            value = getattr(self.settings, entry.name)
            shown = MASK if entry.metadata["secret"] and value is not None else show(value)
            shown = _USER_IN_URL.sub(f"//{MASK}@", shown)
            yield entry.name, shown, self.origins[entry.name]

    def secrets(self) -> set[str]:
        """The values that must never be seen."""
        values = (getattr(self.settings, entry.name) for entry in fields(Settings) if entry.metadata["secret"])
        return {value for value in values if value}


def show(value: object) -> str:
    """A value as a person would write it."""
    if value is None:
        return ""
    if isinstance(value, frozenset):
        return ",".join(str(code) for code in sorted(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def secret_names() -> set[str]:
    """All names of environment variables that hold credentials."""
    names: set[str] = set()
    for entry in fields(Settings):
        if entry.metadata["secret"]:
            names |= {environment_name(entry.name), *(alias for alias, _ in entry.metadata["aliases"])}
    return names


def environment_name(name: str) -> str:
    """The environment's name of a setting."""
    return PREFIX + name.upper()


def flag_name(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def load(flags: Mapping[str, str], environ: Mapping[str, str], file: Path | None = None) -> Configuration:
    """Gather all settings.

    Args:
        flags: By setting's name, as typed; only those given.
        environ: The environment.
        file: The file to read; None looks for HEELER_CONFIG, then for heeler.toml in the working directory.

    Raises:
        UsageError: A name is unknown or a value is not of its kind; both are named.
    """
    _refuse_unknown_environment(environ)
    path, content = _read_file(file, environ)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for entry in fields(Settings):
        values[entry.name], origins[entry.name] = _resolve(entry, flags, environ, path, content)
    defaulted = not values["state_dir"]
    values["state_dir"] = values["state_dir"] or _default_state_dir()
    if origins["kelpie_state_file"] != "default":
        # Workers of one machine that each have a state file of Kelpie's are not in one another's way otherwise, too.
        if defaulted:
            values["state_dir"] += f"/kelpie-{_mark_of(Path(values['kelpie_state_file']).absolute())}"
        if origins["control"] == "default":
            values["control"] = values["control"].rpartition(":")[0] + ":0"
    for service in ("s3", "sqs"):
        key, token = f"{service}_access_key_id", f"{service}_session_token"
        own_key = values[key] is not None and "environment AWS_" not in origins[key]
        if own_key and "AWS_SESSION_TOKEN" in origins[token]:
            # The token belongs to the AWS_ keys, which are another service's where this one has its own.
            values[token], origins[token] = None, "default"
    return Configuration(Settings(**values), origins)


def _mark_of(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:16]


def _resolve(
    entry: Field[Any],
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    path: Path | None,
    content: Mapping[str, Any],
) -> tuple[Any, str]:
    name, parse = entry.name, entry.metadata["parse"]
    if name in flags:
        return _parsed(parse, flags[name], flag_name(name)), f"flag {flag_name(name)}"
    for known, own_parse in ((environment_name(name), None), *entry.metadata["aliases"]):
        if environ.get(known):
            return _parsed(own_parse or parse, environ[known], known), f"environment {known}"
    if name in content:
        return _parsed(parse, _as_text(content[name]), f"{path}: {name}"), f"file {path}"
    return entry.default, "default"


def _parsed(parse: Callable[[str], Any], value: str, where: str) -> Any:
    try:
        return parse(value)
    except (ValueError, KeyError):
        raise UsageError(f"{where} is {value!r}, but must be {_words(parse)}") from None


def _words(parse: Callable[[str], Any]) -> str:
    said = (parse.__doc__ or "").rstrip(".")
    return said[:1].lower() + said[1:]


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(str(part) for part in value)
    return repr(value) if isinstance(value, float) else show(value)


def _refuse_unknown_environment(environ: Mapping[str, str]) -> None:
    known = {environment_name(entry.name) for entry in fields(Settings)} | _NOT_SETTINGS
    for name in environ:
        if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name):
            raise UsageError(f"{name} is no setting of heeler{_nearest(name, known)}")


def _read_file(file: Path | None, environ: Mapping[str, str]) -> tuple[Path | None, Mapping[str, Any]]:
    named = file or (Path(environ["HEELER_CONFIG"]) if environ.get("HEELER_CONFIG") else None)
    path = named or Path("heeler.toml")
    if named is None and not path.exists():
        return None, {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    known = {entry.name for entry in fields(Settings)}
    for name in content:
        if name not in known:
            raise UsageError(f"{path}: {name} is no setting of heeler{_nearest(name, known)}")
    return path, content


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; `heeler config` lists them all"
