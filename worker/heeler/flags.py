"""Settings as flags of commands: each command names the settings that it takes, and gets them gathered."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from heeler.config import environment_name, flag_name, load, show
from heeler.settings import Settings

_ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings file [default: heeler.toml, if there].")
]


def with_settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a command the flags of the named settings, and `configuration` as its first argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        taken = list(inspect.signature(command).parameters.values())[1:]
        own = [parameter.replace(annotation=hints[parameter.name]) for parameter in taken]
        options = [_option(entry.name) for entry in fields(Settings) if entry.name in names]
        file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_ConfigFile)

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            flags = {name: value for name in names if (value := arguments.pop(name)) is not None}
            configuration = load(flags, os.environ, arguments.pop("config"))
            command(configuration, **arguments)

        parameters = [*own, *options, file]
        parameters.sort(key=lambda parameter: parameter.kind)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__
        return run

    return decorate


def _option(name: str) -> inspect.Parameter:
    entry = next(entry for entry in fields(Settings) if entry.name == name)
    default = f" [default: {show(entry.default)}]" if show(entry.default) else ""
    words = entry.metadata["words"][:1].upper() + entry.metadata["words"][1:]
    help_text = f"{words}.{default} ({environment_name(name)})"
    option = typer.Option(flag_name(name), metavar="VALUE", help=help_text)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )
