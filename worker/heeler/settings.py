"""All settings: each is declared once, here, as a field of `Settings`.

Flags, environment names, the file's keys, `heeler config` and README's table follow from it (`heeler.config`). Names of
other workers are honoured as aliases (PROTOCOLS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heeler import kinds

Alias = tuple[str, Callable[[str], Any] | None]


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

    source: str | None = _setting(None, "where jobs come from: sqs, salad, kelpie, local:FOLDER or once")
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
        aliases=("SALAD_LOG_LEVEL", ("KELPIE_LOG_LEVEL", kinds.kelpie_log_level)),
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
    kelpie_url: str = _setting("https://kelpie.saladexamples.com", "URL of Kelpie's API", aliases=("KELPIE_API_URL",))
    kelpie_api_key: str | None = _setting(
        None, "key of Kelpie's own for its API", aliases=("KELPIE_API_KEY",), secret=True
    )
    kelpie_poll: float = _setting(
        10.0, "between two questions to Kelpie's API for work", kinds.limit, aliases=("HEARTBEAT_INTERVAL_S",)
    )
    kelpie_snapshots: bool = _setting(False, "keep the checkpoints of Kelpie's jobs as snapshots", kinds.flag)
    kelpie_state_file: str = _setting(
        "kelpie-state.json", "where programs of Kelpie's jobs read what is under way", aliases=("KELPIE_STATE_FILE",)
    )
    salad_api_key: str | None = _setting(
        None, "key of SaladCloud's, for Kelpie's API", aliases=("SALAD_API_KEY",), secret=True
    )
    salad_organization: str | None = _setting(
        None, "organization that it belongs to", aliases=("SALAD_ORGANIZATION_NAME", "SALAD_ORGANIZATION")
    )
    salad_project: str | None = _setting(
        None, "project of Kelpie's jobs", aliases=("SALAD_PROJECT_NAME", "SALAD_PROJECT")
    )
    machine_id: str | None = _setting(None, "who this machine is to Kelpie's API", aliases=("SALAD_MACHINE_ID",))
    container_group_id: str | None = _setting(
        None, "whose jobs to ask Kelpie's API for", aliases=("SALAD_CONTAINER_GROUP_ID",)
    )
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
    move_when_idle: float = _setting(
        0.0,
        "move to another machine after so many seconds without a job; 0 is never",
        kinds.seconds,
        aliases=("MAX_TIME_WITH_NO_WORK_S",),
    )
    recreate_between_jobs: bool = _setting(
        False, "have the container made anew after each job", kinds.flag, aliases=("KELPIE_RECREATE_BETWEEN_JOBS",)
    )
    overlap: str = _setting(
        "auto",
        "take the next job while the outputs of the last one upload: on, off, or auto (on with kelpie)",
        kinds.choice("auto", "on", "off"),
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
        aliases=(("FILE_WATCHER_STABILITY_CHECK_MS", kinds.four_times_milliseconds),),
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
