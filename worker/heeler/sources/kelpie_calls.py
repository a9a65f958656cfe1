"""What a worker asks of Kelpie's API (PROTOCOLS 3)."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from heeler.sources.base import SourceUnavailableError
from heeler.sources.kelpie_http import KelpieClient, NoSuchJobError
from heeler.sources.kelpie_job import Row


@dataclass(frozen=True)
class Identity:
    """Who asks: a machine, and the container group whose jobs it takes."""

    machine_id: str
    container_group_id: str

    def as_json(self) -> dict[str, str]:
        """As it goes with each call."""
        return {"machine_id": self.machine_id, "container_group_id": self.container_group_id}


class KelpieCalls:
    """The calls of one worker. Each raises as `KelpieClient.call`.

    That there is no such job the API must say twice: a wrong word of whoever answered once would end a program.
    """

    def __init__(self, client: KelpieClient, identity: Identity) -> None:
        self._client = client
        self.identity = identity

    @property
    def name(self) -> str:
        """The API, for people."""
        return self._client.name

    async def work(self) -> Row | None:
        """Take a job; as it was just before it was taken."""
        found = await self._client.call("GET", "/work", query=self.identity.as_json())
        if not isinstance(found, list):
            raise SourceUnavailableError(f"Kelpie's API at {self.name} gave no list of jobs")
        return Row.of(found[0]) if found else None

    async def job(self, job_id: str) -> Row:
        """A job as it is now."""
        try:
            found = await self._look(job_id)
        except NoSuchJobError:
            found = await self._look(job_id)
        return Row.of(found)

    async def heartbeat(self, job_id: str) -> str:
        """Keep a job; its status. "canceled" also means that another machine has it."""
        return await self._status("heartbeat", job_id)

    async def completed(self, job_id: str) -> None:
        """Report a job as done. The API takes it from anyone."""
        await self._tell("completed", job_id)

    async def failed(self, job_id: str) -> None:
        """Report a failure: it counts, and this machine gets the job no more. The API takes it from anyone."""
        await self._tell("failed", job_id)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _look(self, job_id: str) -> Awaitable[Any]:
        return self._client.call("GET", _path(job_id))

    async def _tell(self, call: str, job_id: str) -> Any:
        try:
            return await self._client.call("POST", f"{_path(job_id)}/{call}", body=self.identity.as_json())
        except NoSuchJobError as error:
            words = str(error)
        await self._look(job_id)
        raise SourceUnavailableError(f"{words}; but it shows that job")

    async def _status(self, call: str, job_id: str) -> str:
        found = await self._tell(call, job_id)
        status = found.get("status") if isinstance(found, dict) else None
        if not isinstance(status, str):
            raise SourceUnavailableError(f"Kelpie's API at {self.name} gave no status of a job")
        return status


def _path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"
