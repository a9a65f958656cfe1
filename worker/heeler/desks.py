"""Finds the desk that settings name: where jobs are submitted and looked up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from heeler.errors import UnavailableError, UsageError
from heeler.settings import Settings
from heeler.sources import folder_of
from heeler.sources.base import Desk, SourceUnavailableError


@contextmanager
def opened_desk(settings: Settings) -> Iterator[Desk]:
    """A desk, for a block.

    Raises:
        UsageError: The source is none that takes jobs from here, or what it was given is wrong.
        UnavailableError: It is out of reach.
    """
    try:
        desk = open_desk(settings)
        try:
            yield desk
        finally:
            desk.close()
    except SourceUnavailableError as error:
        raise UnavailableError(str(error)) from None


def open_desk(settings: Settings) -> Desk:
    """The desk, which is to be closed.

    Raises:
        UsageError: As `opened_desk`.
        SourceUnavailableError: It can't be opened now.
    """
    spec = settings.source or _guessed(settings)
    if spec is None:
        raise UsageError(
            "no source of jobs: set --source (or HEELER_SOURCE) to sqs or kelpie, or to local:FOLDER for a queue in a"
            " folder"
        )
    name, _, address = spec.partition(":")
    if name == "local":
        from heeler.sources.local import LocalDesk  # noqa: PLC0415 - only what is used

        return LocalDesk(folder_of(address))
    if name == "sqs":
        return _sqs_desk(settings, address)
    if name == "kelpie":
        return _kelpie_desk(settings, address)
    raise UsageError(f"source {name!r} takes no jobs from here; use sqs or local:FOLDER, or kelpie for Kelpie's API")


def _guessed(settings: Settings) -> str | None:
    """As `heeler.sources.guess_source`, of those that take jobs from here."""
    if settings.sqs_queue_url is not None:
        return "sqs"
    return "kelpie" if settings.kelpie_api_key is not None else None


def _sqs_desk(settings: Settings, url: str) -> Desk:
    from heeler.records.desk import RecordDesk  # noqa: PLC0415 - boto and storage are slow to import
    from heeler.records.opening import open_records  # noqa: PLC0415
    from heeler.sources.sqs import address_of  # noqa: PLC0415
    from heeler.sqs_desk import SqsDesk  # noqa: PLC0415
    from heeler.storage import stores  # noqa: PLC0415
    from heeler_sync.paths import parse_location  # noqa: PLC0415

    address = address_of(settings, url)
    open_store = stores(settings)
    records = open_records(settings, address.name, open_store)
    if records is None or settings.records is None:
        return SqsDesk(address, None)
    bucket = parse_location(settings.records).bucket
    return SqsDesk(address, RecordDesk(records, lambda: open_store(bucket)))


def _kelpie_desk(settings: Settings, address: str) -> Desk:
    from heeler.kelpie_desk import KelpieDesk  # noqa: PLC0415 - only what is used
    from heeler.platform.imds import Imds  # noqa: PLC0415
    from heeler.sources.kelpie_http import KelpieClient, credentials_of  # noqa: PLC0415

    if address:
        raise UsageError(f"source kelpie takes no address ({address!r}): set KELPIE_API_URL (or --kelpie-url)")
    # The name of a container group says nothing of the machine here: who submits from elsewhere has to set it.
    on_saladcloud = settings.machine_id is not None or settings.metadata_uri != Settings.metadata_uri
    machine = Imds(settings.metadata_uri) if on_saladcloud and settings.kelpie_api_key is None else None
    client = KelpieClient(settings.kelpie_url, credentials_of(settings, machine))
    return KelpieDesk(client, settings.container_group_id, None if machine is None else machine.close)
