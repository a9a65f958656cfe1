"""`heeler run` as a process: logging, the event loop, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import anyio

from heeler.config import Configuration
from heeler.errors import EXIT_BUG, HeelerError, UsageError
from heeler.log import Logger, logging_to
from heeler.memory import share_freed_memory
from heeler.supervisor import supervise


def run_worker(configuration: Configuration, job_file: Path | None, program: Sequence[str] = ()) -> NoReturn:
    """Run a worker and exit with its code; one that can't start says why in one line.

    Raises:
        UsageError: The job's file can't be read.
    """
    if job_file is not None:
        configuration = _with_job(configuration, job_file)
    share_freed_memory()
    try:
        settings = configuration.settings
        with logging_to(sys.stderr, settings.log_format, configuration.secrets(), settings.log_level) as log:
            code = _supervise(configuration, program, log)
    except HeelerError as error:
        sys.stderr.write(f"heeler: {error}\n")
        sys.stderr.flush()
        code = error.exit_code
    # A thread may hang in a request that storage never answers, or in a write that nobody reads: the interpreter
    # would wait for it. Nothing is left to flush; what programs print is passed on at once.
    os._exit(code)


def _supervise(configuration: Configuration, program: Sequence[str], log: Logger) -> int:
    try:
        return anyio.run(supervise, configuration, program, log, partial(_leave, log))
    except HeelerError:
        raise
    except Exception as error:  # noqa: BLE001 - the last place that can say what happened
        trace = "".join(traceback.format_exception(error))
        log("error", "bug", {"error": f"{type(error).__name__}: {error}", "traceback": trace})
        return EXIT_BUG


def _leave(log: Logger) -> NoReturn:
    log.close()
    os._exit(0)


def _with_job(configuration: Configuration, file: Path) -> Configuration:
    try:
        document = file.read_bytes().decode("utf-8", "surrogateescape")  # an app gets it byte for byte
    except (OSError, ValueError) as error:
        raise UsageError(f"job file {file} can't be read: {getattr(error, 'strerror', None) or error}") from None
    settings = replace(configuration.settings, job=document, source=configuration.settings.source or "once")
    return replace(configuration, settings=settings)
