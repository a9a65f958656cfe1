"""Commands and exit codes, thin: each reads its arguments, calls one function and prints what comes back."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from heeler import __version__, signals
from heeler.config import Configuration
from heeler.errors import EXIT_USAGE, HeelerError, UsageError
from heeler.flags import with_settings
from heeler.settings import Settings
from heeler.sync.commands import sync_app

app = typer.Typer(
    name="heeler",
    help="Keeps long jobs alive on machines that vanish: takes them from a queue, keeps their lease and their files.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_RUN_SETTINGS = tuple(
    entry.name for entry in fields(Settings) if not entry.metadata["secret"] and entry.name not in ("job", "when_done")
)


@app.command()
@with_settings(*_RUN_SETTINGS, "when_done")
def run(
    configuration: Configuration,
    job: Annotated[
        Path | None, typer.Option("--job", metavar="FILE", help="One job, from a file: the source once.")
    ] = None,
    program: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- PROGRAM ARGS...", help="An HTTP server to run; each job is one POST to it."),
    ] = None,
) -> None:
    """Take jobs and run them, until told to stop."""
    from heeler.run import run_worker  # noqa: PLC0415 - imports what only a worker needs

    run_worker(configuration, job, program or ())


@app.command()
@with_settings(*(name for name in _RUN_SETTINGS if name != "source"), "when_done")
def kelpie(configuration: Configuration) -> None:
    """Take the jobs of Kelpie's API in the place of Kelpie's own worker, with its variables and nothing else."""
    from heeler.run import run_worker  # noqa: PLC0415

    settings = replace(configuration.settings, source="kelpie")
    run_worker(replace(configuration, settings=settings), None)


_DESK_SETTINGS = (
    "source",
    "records",
    "sqs_queue_url",
    "sqs_region",
    "sqs_endpoint",
    "kelpie_url",
    "salad_organization",
    "salad_project",
    "container_group_id",
    "s3_endpoint",
    "s3_region",
    "s3_provider",
)


@app.command()
@with_settings(*_DESK_SETTINGS)
def submit(
    configuration: Configuration,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A job document, a list of them, or one a line.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when all have ended; exit code 1 if one failed.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew: no checkpoint or result of an earlier run counts.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="FILE is one message for an app (app mode), to be sent as it is.")
    ] = False,
    array: Annotated[
        int | None,
        typer.Option(
            "--array", metavar="N", min=1, max=10_000, help="Each document N times: index 0 to N-1, id ID-0 ..."
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="NAME", help="Message group of a FIFO queue [default: the job's id]."),
    ] = None,
) -> None:
    """Put jobs into the queue and print their ids, one a line."""
    from heeler import desk  # noqa: PLC0415

    how = desk.Submission(file, wait, fresh, array, group)
    for flag, given in (("--fresh", fresh), ("--array", array is not None)):
        if raw and given:
            raise UsageError(f"{flag} changes a job document, and --raw sends a message as it is: leave one out")
    raise typer.Exit((desk.submit_message if raw else desk.submit)(configuration.settings, how))


jobs_app = typer.Typer(
    invoke_without_command=True, help="List the jobs of the queue.", rich_markup_mode=None, no_args_is_help=False
)
app.add_typer(jobs_app, name="jobs")
app.add_typer(sync_app, name="sync")
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@jobs_app.callback()
@with_settings(*_DESK_SETTINGS)
def jobs(configuration: Configuration, context: typer.Context, json: _Json = False) -> None:
    """List the jobs of the queue, oldest first."""
    from heeler import desk  # noqa: PLC0415

    context.obj = configuration
    if context.invoked_subcommand is None:
        desk.print_jobs(configuration.settings, as_json=json)


@jobs_app.command("show")
@with_settings(*_DESK_SETTINGS)
def jobs_show(
    configuration: Configuration,
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    json: _Json = False,
) -> None:
    """Show one job."""
    from heeler import desk  # noqa: PLC0415

    desk.print_job(_nearest(context.obj, configuration), job_id, as_json=json)


def _nearest(outer: Configuration, inner: Configuration) -> Settings:
    """The settings of a command below another: a flag counts wherever it stands, and before what is no flag."""
    ranks = ("default", "file", "environment", "flag")
    found = {}
    for name, origin in outer.origins.items():
        own = ranks.index(inner.origins[name].split()[0]) >= ranks.index(origin.split()[0])
        found[name] = getattr((inner if own else outer).settings, name)
    return Settings(**found)


@app.command()
@with_settings(*_DESK_SETTINGS)
def cancel(configuration: Configuration, job_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Cancel a job; a running one stops at its next heartbeat."""
    from heeler import desk  # noqa: PLC0415

    desk.cancel(configuration.settings, job_id)


@app.command()
@with_settings(*_DESK_SETTINGS)
def result(
    configuration: Configuration,
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write it there, not to standard output.")
    ] = None,
) -> None:
    """Print what a job left: an app's answer byte for byte, or how a command ended."""
    from heeler import desk  # noqa: PLC0415

    desk.print_result(configuration.settings, job_id, output)


@app.command()
@with_settings("source", "state_dir", "control")
def status(configuration: Configuration, json: _Json = False) -> None:
    """Show what the runtime on this machine is doing, and the queue if one is named."""
    from heeler import desk  # noqa: PLC0415

    desk.print_status(configuration.settings, as_json=json)


@app.command()
@with_settings("state_dir", "control")
def checkpoint(configuration: Configuration, json: _Json = False) -> None:
    """Make the running job's checkpoints durable as they are now; return when they are."""
    from heeler import desk  # noqa: PLC0415

    desk.take_checkpoint(configuration.settings, as_json=json)


@app.command("config")
@with_settings(*(entry.name for entry in fields(Settings) if entry.name != "job"))
def show_config(configuration: Configuration, json: _Json = False) -> None:
    """Print every setting with its origin, secrets masked."""
    from heeler import desk  # noqa: PLC0415

    desk.print_config(configuration, as_json=json)


@app.command()
def local(
    port_base: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65000, help="The first of some ports in a row; 0 takes free ones.")
    ] = 0,
    machines: Annotated[int, typer.Option(min=1, max=100, help="How many; each worker wants one of its own.")] = 1,
    app_port: Annotated[int, typer.Option(min=1, max=65535, help="Where the app listens, for the Salad queue.")] = 8080,
    app_path: Annotated[str, typer.Option(help="The path that jobs are POSTed to.")] = "/",
    env_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the environment there, too; of machine 2 to FILE.2 ...")
    ] = None,
) -> None:
    """Run S3, SQS, the Salad Job Queue and Kelpie's API on loopback, print the environment, and log each job."""
    from heeler.local.serve import LocalOptions, run_local  # noqa: PLC0415

    run_local(LocalOptions(port_base, machines, app_port, app_path, env_file))


@app.command()
def demo(
    seconds: Annotated[float, typer.Option("--seconds", min=2, max=60, help="How long the job computes.")] = 8.0,
) -> None:
    """Run a job, kill its worker midway, start another, and show that the result is the same."""
    from heeler.local.demo import run_demo  # noqa: PLC0415

    raise typer.Exit(run_demo(seconds))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"heeler {__version__}")


def run_cli() -> None:
    """Run the command that the arguments name and exit; every error of the user's is one line."""
    if sys.argv[1:2] != ["run"]:
        signals.release()
    if not sys.argv[1:]:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
    except HeelerError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except Exception as error:
        # click's errors, which typer carries under a private name since 0.2x and click's own before.
        if not hasattr(error, "format_message"):
            raise
        if message := error.format_message():
            _fail(f"{message.rstrip('.')}; see heeler --help", EXIT_USAGE)
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"heeler: {message}\n")
    sys.exit(code)
