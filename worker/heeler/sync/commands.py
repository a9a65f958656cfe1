"""`heeler sync`: a person's commands on any prefix. Flags only; what they do is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heeler.config import Configuration
from heeler.flags import with_settings

sync_app = typer.Typer(
    help="Bring folders to storage and back, and look after what is there.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_STORAGE = ("s3_endpoint", "s3_region", "s3_provider", "s3_timeout", "startup_timeout", "state_dir")

_WATCH = ("checkpoint_quiet", "commit_interval", "max_wait", "debounce", "open_wait", "stop_grace")

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A local folder.")]
_Url = Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/prefix/")]
_Mode = Annotated[
    str | None,
    typer.Option(
        "--mode", metavar="MODE", help="snapshot (generations) or mirror (plain keys) [default: what the prefix has]."
    ),
]
_JobId = Annotated[
    str, typer.Option("--job-id", metavar="ID", help="The job that the prefix belongs to: take it from its worker.")
]
_Unfenced = Annotated[
    bool, typer.Option("--allow-unfenced", help="Keep snapshots in storage that can't keep two writers apart.")
]
_Generation = Annotated[int | None, typer.Option("--generation", metavar="N", min=1, help="This one, not the newest.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@sync_app.command()
@with_settings(*_STORAGE, "keep_generations")
def push(
    configuration: Configuration,
    folder: _Folder,
    url: _Url,
    mode: _Mode = None,
    job_id: _JobId = "",
    unfenced: _Unfenced = False,
    json: _Json = False,
) -> None:
    """Bring a folder to storage: as one new generation, or the files that differ. Nothing else is deleted there."""
    from heeler.sync import push  # noqa: PLC0415 - storage is imported when it is asked for

    push.push(configuration, folder, url, push.PushOptions(mode, job_id, unfenced=unfenced, as_json=json))


@sync_app.command()
@with_settings(*_STORAGE)
def pull(
    configuration: Configuration,
    url: _Url,
    folder: _Folder,
    mode: _Mode = None,
    generation: _Generation = None,
    move_aside: Annotated[
        bool, typer.Option("--move-aside", help="Move other files of the folder to DIR/.heeler/aside.")
    ] = False,
    json: _Json = False,
) -> None:
    """Make a folder equal to what storage holds: the newest whole generation, or the plain keys."""
    from heeler.sync import pull  # noqa: PLC0415

    options = pull.PullOptions(mode, generation, move_aside=move_aside, as_json=json)
    pull.pull(configuration, url, folder, options)


@sync_app.command()
@with_settings(*_STORAGE, "keep_generations", *_WATCH)
def watch(
    configuration: Configuration,
    folder: _Folder,
    url: _Url,
    mode: _Mode = None,
    ready: Annotated[
        str | None,
        typer.Option("--ready", metavar="GLOB", help="Of snapshots: the file that is written last of each state."),
    ] = None,
    job_id: _JobId = "",
    unfenced: _Unfenced = False,
) -> None:
    """Keep a folder in storage until SIGINT or SIGTERM, which take it a last time, whole."""
    from heeler.sync import watch  # noqa: PLC0415

    watch.watch(configuration, folder, url, watch.WatchOptions(mode, ready, job_id, unfenced=unfenced))


@sync_app.command("ls")
@with_settings(*_STORAGE)
def list_(
    configuration: Configuration,
    url: _Url,
    mode: _Mode = None,
    files: Annotated[bool, typer.Option("--files", help="List the files of one generation.")] = False,
    generation: _Generation = None,
    json: _Json = False,
) -> None:
    """Show what a prefix holds: who has it and its generations, or its objects."""
    from heeler.sync import look  # noqa: PLC0415

    options = look.ListOptions(mode, generation, files=files or generation is not None, as_json=json)
    look.print_listing(configuration, url, options)


@sync_app.command()
@with_settings(*_STORAGE)
def verify(configuration: Configuration, url: _Url, mode: _Mode = None, json: _Json = False) -> None:
    """Read all of a prefix and name what is missing, damaged or unreferenced; exit code 1 if something is lost."""
    from heeler.sync import verify  # noqa: PLC0415

    verify.print_findings(configuration, url, mode, as_json=json)


@sync_app.command()
@with_settings(*_STORAGE, "keep_generations")
def repair(
    configuration: Configuration,
    url: _Url,
    generation: _Generation = None,
    job_id: Annotated[
        str, typer.Option("--job-id", metavar="ID", help="The job that it is to belong to [default: nobody's].")
    ] = "",
    run_id: Annotated[
        str, typer.Option("--run-id", metavar="ID", help="The run of a job that was submitted with --fresh.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do it without asking.")] = False,
    unfenced: _Unfenced = False,
) -> None:
    """Write a new head for generations that have none, or none that can be read. Stop all workers of them first."""
    from heeler.sync import repair  # noqa: PLC0415

    options = repair.RepairOptions(generation, job_id, run_id, yes=yes, unfenced=unfenced)
    repair.repair(configuration, url, options)
