"""Taking a prefix for a person's push: only one that is nobody's, or the job's that the person names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio

from heeler.errors import UsageError
from heeler.settings import Settings
from heeler.sync.place import FailedError, Place, held_by_job, holder_name
from heeler.sync.voice import Voice
from heeler_sync.errors import NotNowError, ObjectNotFoundError
from heeler_sync.groups import for_each
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.snapshot.committer import Committer, Taking
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.holder import Adoptable, Claim, Holder, acquire
from heeler_sync.snapshot.scan import TreeScan
from heeler_sync.snapshot.session import Fences
from heeler_sync.snapshot.uploads import Uploads
from heeler_sync.store.retry import retrying
from heeler_sync.threads import in_thread

PERMIT = AlwaysPermitted()
_HINDERED_SECONDS = 10.0
_AT_ONCE = 8


@dataclass(frozen=True)
class Hold:
    """How a prefix is to be held.

    Attributes:
        job_id: The job that the person names; empty for nobody's.
        unfenced: Whether storage may be unable to keep two writers apart.
    """

    job_id: str = ""
    unfenced: bool = False


def check_source(folder: Path) -> Path:
    """The folder that is to be pushed, absolute.

    Raises:
        UsageError: It is none.
    """
    root = folder.absolute()
    try:
        if not root.exists():
            raise UsageError(f"DIR {folder} is not there; nothing was pushed")
        if not root.is_dir():
            raise UsageError(f"DIR {folder} is not a folder; name the folder that it is in")
    except OSError as error:
        raise UsageError(f"DIR {folder} can't be looked at: {error.strerror}") from None
    return root


def claim_on(place: Place, hold: Hold) -> Claim:
    """The claim that a person may make on a prefix.

    Raises:
        HeelerError: It belongs to a job that was not named.
        SyncError: Its head can't be read.
    """
    place.require_head()
    if place.head is None:
        return Claim(hold.job_id, "", 1, holder_name(), ordered=False)
    head = place.head[0]
    if head.job_id and head.job_id != hold.job_id:
        raise held_by_job(str(place.location), head.job_id)
    if head.job_id and head.complete:
        raise FailedError(f"{place.location} holds the checkpoints of job {head.job_id}, which is done: they stay")
    if head.job_id != hold.job_id:
        return Claim(hold.job_id, "", 1, holder_name(), ordered=False)
    return Claim(head.job_id, head.run_id, head.attempt, holder_name(), ordered=False)


async def take(place: Place, claim: Claim, hold: Hold, settings: Settings, voice: Voice, uploads: Uploads) -> Holder:
    """Take the prefix from whoever held it; what an interrupted push of this machine has sent is not sent again.

    Raises:
        SyncError: It can't be taken, or its storage does not keep two writers apart.
    """
    fences = Fences(voice.on_event, allow_unfenced=hold.unfenced or settings.allow_unfenced)
    await fences.require(place.layout)
    if place.head is None and await _has_plain_keys(place):
        voice.note(f"{place.location} holds plain keys: they stay, and no snapshot has them from now on")
    epoch, left = await _left_by_an_earlier_push(place, uploads)
    return await acquire(
        place.layout,
        claim,
        PERMIT,
        voice.on_event,
        keep=settings.keep_generations,
        fenced=fences.trusted,
        adopt=lambda head: left if head.epoch == epoch else {},
    )


async def _left_by_an_earlier_push(place: Place, uploads: Uploads) -> tuple[int, Mapping[str, Adoptable]]:
    """The packs that a push of the present epoch has sent and that are there: of which epoch, and which."""
    if place.head is None:
        return 0, {}
    head = place.head[0]
    noted = await in_thread(uploads.load, str(place.location), head)
    there: dict[str, Adoptable] = {}

    async def look(pack: str) -> None:
        # The prefix may have been deleted and made anew, with its epochs counted from 1 again.
        try:
            key = place.layout.pack_key(pack)
            info = await retrying(place.policy, lambda: place.store.head(key))
        except ObjectNotFoundError:
            return
        if info.size == noted[pack].size:
            there[pack] = noted[pack]

    await for_each(noted, look, _AT_ONCE)
    return head.epoch, there


async def _has_plain_keys(place: Place) -> bool:
    async for page in place.store.list(place.location.prefix):
        if any(not info.key.startswith(place.layout.own) for info in page):
            return True
    return False


def as_it_is() -> Taking:
    """A folder is taken as it is, because a person says so."""

    async def confirm() -> None:
        return

    return Taking(late=_none, confirm=confirm, must_be_closed=_none, begin=_nothing, taken=_nothing)


def _none(_scan: TreeScan) -> set[str]:
    return set()


def _nothing() -> None:
    return


async def commit(committer: Committer, on_try: Callable[[], None] = _nothing) -> Kept | None:
    """Commit the folder as it is, patient with one that is being changed.

    Raises:
        FailedError: It does not stop being changed.
    """
    give_up = anyio.current_time() + _HINDERED_SECONDS
    while True:
        on_try()
        try:
            return await committer.commit(as_it_is())
        except NotNowError as error:
            if anyio.current_time() >= give_up:
                raise FailedError(
                    f"{committer.root}: {error}; stop the program that writes there, or use heeler sync watch"
                ) from None
        await anyio.sleep(0.5)
