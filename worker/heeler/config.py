"""Settings: flags before environment before file before defaults, each value with its origin.

A setting is declared once, as a field of `Settings`; flags, environment names, the file's keys, `heeler config`
and README's table all follow from it. Names of other workers are honoured as aliases (PROTOCOLS.md).
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from heeler import kinds
from heeler.errors import UsageError

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


Alias = tuple[str, Callable[[str], Any] | None]


def _default_state_dir() -> str:
    if os.geteuid() == 0:
        return "/var/lib/heeler"
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return str(Path(base).expanduser() / "heeler")


def _setting(
    default: Any,
    words: str,
    parse: Callable[[str], Any] = kinds.text,
    *,
    aliases: tuple[str | Alias, ...] = (),
    secret: bool = False,
) -> Any:
    pairs = tuple((alias, None) if isinstance(alias, str) else alias for alias in aliases)
    return field(
        default=default,
        repr=not secret,
        metadata={"words": words, "parse": parse, "aliases": pairs, "secret": secret},
    )


@dataclass(frozen=True)
class Settings:
    """All settings. Times are in seconds."""

    source: str | None = _setting(None, "where jobs come from: sqs, salad, local:FOLDER or once")
    job: str | None = _setting(None, "the job document of the source once (JSON); for an app its message")
    max_jobs: int | None = _setting(None, "end after so many jobs", kinds.count)
    exit_when_idle: float | None = _setting(None, "end after so many seconds without a job", kinds.seconds)
    when_done: str = _setting(
        "exit", "what to do when the work is done: exit, or stay idle", kinds.choice("exit", "idle")
    )
    stop_grace: float = _setting(30.0, "from SIGTERM to our exit", kinds.seconds)
    retry_exit_codes: frozenset[int] = _setting(
        frozenset({75}), "exit codes of a program that mean: again, not counted", kinds.codes
    )
    scrub_env: bool = _setting(False, "take all credentials out of the program's environment", kinds.flag)
    retry_delay: float = _setting(
        2.0, "rest before a failed job's second attempt; it doubles, up to 300", kinds.seconds
    )
    state_dir: str = _setting("", "folder for what has to outlive this process")
    control: str = _setting("127.0.0.1:8642", "loopback address of the control API, or off; port 0 takes a free one")
    startup_timeout: float = _setting(60.0, "how long storage may be out of reach at the start", kinds.seconds)
    log_format: str = _setting("auto", "auto (text on a terminal), json or text", kinds.choice("auto", "json", "text"))
    log_level: str = _setting(
        "info",
        "the least that is logged: debug, info, warn or error",
        kinds.choice("debug", "info", "warn", "error"),
        aliases=("SALAD_LOG_LEVEL",),
    )
    delivery: str = _setting(
        "auto",
        "how jobs reach the program: app (a POST each) or command; auto is app with a program, --app-url or salad",
        kinds.choice("auto", "app", "command"),
    )
    concurrency: int = _setting(1, "how many jobs at a time", kinds.count)
    app_url: str | None = _setting(None, "where the app answers; the port that the program listens on if unset")
    app_path: str = _setting("/", "the path to POST jobs to, where the queue names none", kinds.path)
    app_health_path: str | None = _setting(None, "a path that answers 2xx while the app can take a job", kinds.path)
    app_start_timeout: float = _setting(
        600.0, "how long a job that is there waits for the app to be ready", kinds.seconds
    )
    app_max_restarts: int = _setting(
        5, "end with the app's exit code after so many restarts without a job", kinds.number
    )
    app_silence: float = _setting(86400.0, "without a byte of an answer, before the app counts as hanging", kinds.limit)
    app_timeout: float = _setting(604800.0, "the longest that one job may take in the app", kinds.limit)
    app_answer_bytes: int = _setting(10 << 20, "the largest answer of the app, in bytes", kinds.count)
    app_tries: int = _setting(
        3, "so often a transient failure is tried here before a try of the queue is spent", kinds.count
    )
    salad_endpoint: str = _setting(
        "job-queue-worker-api.salad.com:443", "host:port of the Salad Job Queue", aliases=("SALAD_SERVICE_ENDPOINT",)
    )
    salad_use_tls: bool = _setting(True, "talk TLS to it", kinds.flag, aliases=("SALAD_SERVICE_USE_TLS",))
    salad_silence: float = _setting(60.0, "without a heartbeat, before its stream counts as broken", kinds.limit)
    sqs_queue_url: str | None = _setting(None, "the queue of the source sqs", aliases=("SQS_QUEUE_URL",))
    sqs_dlq_url: str | None = _setting(
        None,
        "where messages go that failed for good; else the dead-letter queue of the queue's redrive policy",
        aliases=("SQS_DLQ_URL",),
    )
    sqs_region: str | None = _setting(
        None,
        "region to sign for, where the queue's URL names none",
        aliases=("SQS_AWS_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    )
    sqs_endpoint: str | None = _setting(
        None, "URL of the service; that of the queue if unset", aliases=("AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL")
    )
    sqs_access_key_id: str | None = _setting(
        None, "access key of the queue", aliases=("SQS_AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"), secret=True
    )
    sqs_secret_access_key: str | None = _setting(
        None, "secret key of the queue", aliases=("SQS_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"), secret=True
    )
    sqs_session_token: str | None = _setting(
        None, "token of temporary credentials of the queue", aliases=("AWS_SESSION_TOKEN",), secret=True
    )
    sqs_visibility: int = _setting(60, "seconds that a message is ours without an extension", kinds.visibility)
    records: str | None = _setting(
        None,
        "s3://bucket/prefix/ where the status and result of each job of sqs are kept",
        aliases=(("R2_BUCKET_NAME", kinds.records_of_bucket),),
    )
    webhook: str | None = _setting(
        None, "URL that is told the end of jobs that name none (sqs with records)", kinds.webhook
    )
    webhook_secret: str | None = _setting(
        None, "whsec_... of 24 to 64 bytes in base64: webhooks are signed with it", secret=True
    )
    metadata_uri: str = _setting(
        "http://169.254.169.254:80", "the metadata service of SaladCloud's machines", aliases=("SALAD_METADATA_URI",)
    )
    max_job_failures: int | None = _setting(
        None, "move to another machine after so many failures in a row", kinds.count, aliases=("MAX_JOB_FAILURES",)
    )
    check_disk: int | None = _setting(None, "bytes that must be free in the job's folders at the start", kinds.count)
    check_uplink: int | None = _setting(None, "bytes a second that must reach the bucket at the start", kinds.count)
    check_downlink: int | None = _setting(None, "bytes a second that must come from it at the start", kinds.count)
    check_bucket: str | None = _setting(None, "s3://bucket/prefix/ for these two checks; else that of checkpoints")
    check_command: str | None = _setting(None, "a command that exits with 0 on a fit machine, such as nvidia-smi")
    inputs: str | None = _setting(None, "s3://bucket/prefix/ downloaded before jobs that name no sync of their own")
    checkpoints: str | None = _setting(None, "s3://bucket/prefix/{job_id}/ restored before and kept during them")
    checkpoint_mode: str = _setting(
        "snapshot", "how checkpoints are kept: snapshot or mirror", kinds.choice("snapshot", "mirror")
    )
    checkpoint_ready: str | None = _setting(
        None, "glob of the file that the program writes last of each checkpoint (snapshot)"
    )
    outputs: str | None = _setting(None, "s3://bucket/prefix/{job_id}/ uploaded after such jobs")
    input_dir: str = _setting("/input", "the folder of inputs", aliases=("INPUT_DIR",))
    checkpoint_dir: str = _setting("/checkpoint", "the folder of checkpoints", aliases=("CHECKPOINT_DIR",))
    output_dir: str = _setting("/output", "the folder of outputs", aliases=("OUTPUT_DIR",))
    debounce: float = _setting(
        0.05,
        "quiet after which a closed file is uploaded",
        kinds.seconds,
        aliases=(("FILE_WATCHER_DEBOUNCE_MS", kinds.milliseconds),),
    )
    open_wait: float = _setting(
        5.0,
        "quiet after which a file that stays open is uploaded",
        kinds.seconds,
        aliases=(("FILE_WATCHER_STABILITY_CHECK_MS", kinds.milliseconds),),
    )
    max_wait: float = _setting(
        300.0,
        "warn of a file that has not settled for so long",
        kinds.seconds,
        aliases=(("FILE_WATCHER_MAX_WAIT_MS", kinds.milliseconds),),
    )
    checkpoint_quiet: float = _setting(
        2.0, "without a change, before a checkpoint without a ready file counts as complete", kinds.seconds
    )
    commit_interval: float = _setting(15.0, "between two commits of such checkpoints", kinds.seconds)
    keep_generations: int = _setting(2, "how many generations of a checkpoint are kept", kinds.count)
    allow_unfenced: bool = _setting(
        False, "keep snapshots in storage that can't keep superseded workers out", kinds.flag
    )
    restore_patience: float = _setting(
        600.0, "without progress, before a restore is left to another worker", kinds.seconds
    )
    s3_endpoint: str | None = _setting(
        None,
        "URL of the storage; AWS if unset",
        aliases=("R2_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    )
    s3_region: str | None = _setting(None, "region to sign for", aliases=("AWS_REGION", "AWS_DEFAULT_REGION"))
    s3_provider: str | None = _setting(
        None, "r2, aws, s3 or rclone; guessed from the endpoint", kinds.choice("r2", "aws", "s3", "rclone")
    )
    s3_access_key_id: str | None = _setting(
        None, "access key", aliases=("R2_AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"), secret=True
    )
    s3_secret_access_key: str | None = _setting(
        None, "secret key", aliases=("R2_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"), secret=True
    )
    s3_session_token: str | None = _setting(
        None, "token of temporary credentials", aliases=("AWS_SESSION_TOKEN",), secret=True
    )
    s3_timeout: float = _setting(30.0, "without a byte, before a storage request counts as broken", kinds.seconds)

    @property
    def state_path(self) -> Path:
        """`state_dir` as an absolute path."""
        return Path(self.state_dir).absolute()


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
    names = {"SALAD_API_KEY", "KELPIE_API_KEY"}
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
    if not values["state_dir"]:
        values["state_dir"] = _default_state_dir()
    for service in ("s3", "sqs"):
        key, token = f"{service}_access_key_id", f"{service}_session_token"
        own_key = values[key] is not None and "environment AWS_" not in origins[key]
        if own_key and "AWS_SESSION_TOKEN" in origins[token]:
            # The token belongs to the AWS_ keys, which are another service's where this one has its own.
            values[token], origins[token] = None, "default"
    return Configuration(Settings(**values), origins)


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
