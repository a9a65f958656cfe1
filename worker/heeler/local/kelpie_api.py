"""Kelpie's API on loopback (PROTOCOLS.md 3): its calls, statuses and bodies, for workers and for those who submit.

What its workers send is read as JSON whatever its type is called: Salad's own calls it text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from heeler.local import web
from heeler.local.kelpie_answers import Refusal, invalid, refusal
from heeler.local.kelpie_auth import Access, Caller
from heeler.local.kelpie_faults import FaultyApp, KelpieFaults
from heeler.local.kelpie_model import SUBMISSION, SUBMISSIONS, WORKER, Status, Submission, Worker
from heeler.local.kelpie_table import KelpieTable, NoJobError
from heeler.local.kelpie_webhooks import KelpieWebhooks
from heeler.local.tokens import TokenIssuer
from heeler.tasks import background

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_Positive = Annotated[int, Query(ge=1, le=2147483647)]

T = TypeVar("T")


def create_app(
    table: KelpieTable,
    tokens: TokenIssuer,
    *,
    kelpie_key: str | None,
    api_key: str,
    organization: str,
    project: str | None = None,
    webhooks: KelpieWebhooks | None = None,
    faults: KelpieFaults | None = None,
) -> FastAPI:
    """The API.

    Args:
        table: The jobs.
        tokens: Who verifies the metadata services' tokens.
        kelpie_key: The organization's key for this API; None if it has none.
        api_key: Its Salad API key.
        organization: Its name.
        project: Its only project; None takes any name for one.
        webhooks: Who sends them, if anybody.
        faults: What to do to calls.
    """
    access = Access(tokens, kelpie_key=kelpie_key, api_key=api_key, organization=organization, project=project)

    async def authorize(request: Request) -> None:
        request.state.caller = access.caller(request.headers)

    app = _new_app()
    guarded = [Depends(authorize)]
    app.include_router(_submitting(table), dependencies=guarded)
    app.include_router(_working(table, webhooks or KelpieWebhooks()), dependencies=guarded)
    app.include_router(_anything_else(), dependencies=guarded)
    app.add_middleware(FaultyApp, faults=faults or KelpieFaults())
    return app


@asynccontextmanager
async def serving(
    table: KelpieTable,
    tokens: TokenIssuer,
    *,
    kelpie_key: str | None,
    api_key: str,
    organization: str,
    project: str | None = None,
    faults: KelpieFaults | None = None,
    port: int = 0,
) -> AsyncIterator[str]:
    """Serve the API and send its webhooks while the block runs; the arguments are those of `create_app`.

    Yields:
        Its URL, without a slash at the end.

    Raises:
        UnavailableError: The port is taken.
    """
    webhooks = KelpieWebhooks()
    app = create_app(
        table,
        tokens,
        kelpie_key=kelpie_key,
        api_key=api_key,
        organization=organization,
        project=project,
        webhooks=webhooks,
        faults=faults,
    )
    async with background(webhooks.run), web.serving(app, port) as url:
        yield url


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _submission(request: Request) -> Submission:
    return await _body(request, SUBMISSION)


async def _submissions(request: Request) -> list[Submission]:
    return await _body(request, SUBMISSIONS)


async def _worker(request: Request) -> Worker:
    return await _body(request, WORKER)


async def _body(request: Request, form: TypeAdapter[T]) -> T:
    return form.validate_json(await request.body())


_Caller = Annotated[Caller, Depends(_caller)]
_Worker = Annotated[Worker, Depends(_worker)]


def _submitting(table: KelpieTable) -> APIRouter:
    router = APIRouter(prefix="/jobs")

    @router.post("", status_code=202)
    async def create(caller: _Caller, body: Annotated[Submission, Depends(_submission)]) -> dict[str, Any]:
        return table.create(caller.user_id, body)

    @router.post("/batch", status_code=202)
    async def batch(caller: _Caller, body: Annotated[list[Submission], Depends(_submissions)]) -> list[dict[str, Any]]:
        return table.batch(caller.user_id, body)

    @router.get("")
    async def list_jobs(
        caller: _Caller,
        status: Status | None = None,
        container_group_id: str | None = None,
        page_size: _Positive = 100,
        page: _Positive = 1,
        asc: bool = False,
    ) -> dict[str, Any]:
        jobs = table.list(
            caller.user_id,
            status=status,
            container_group_id=container_group_id,
            page_size=page_size,
            page=page,
            asc=asc,
        )
        return {"_count": len(jobs), "jobs": jobs}

    @router.get("/{job_id}")
    async def get(caller: _Caller, job_id: str) -> dict[str, Any]:
        return table.get(caller.user_id, job_id)

    @router.delete("/{job_id}", status_code=202)
    async def cancel(caller: _Caller, job_id: str) -> dict[str, str]:
        table.cancel(caller.user_id, job_id)
        return {"message": "Job canceled"}

    @router.delete("/container-groups/{container_group_id}")
    async def purge(caller: _Caller, container_group_id: str) -> dict[str, int]:
        return {"count": table.purge(caller.user_id, container_group_id)}

    return router


def _working(table: KelpieTable, webhooks: KelpieWebhooks) -> APIRouter:
    router = APIRouter()

    @router.get("/work")
    async def work(caller: _Caller, machine_id: str, container_group_id: str) -> list[dict[str, Any]]:
        job = table.work(caller.user_id, machine_id, container_group_id)
        if job is None:
            return []
        worker = Worker(machine_id=machine_id, container_group_id=container_group_id)
        webhooks.tell(job, "running", worker, caller.kelpie_key)
        return [job]

    @router.post("/jobs/{job_id}/heartbeat")
    async def heartbeat(caller: _Caller, job_id: str, worker: _Worker) -> dict[str, str]:
        return {"status": table.heartbeat(caller.user_id, job_id, worker.machine_id)}

    @router.post("/jobs/{job_id}/completed")
    async def completed(caller: _Caller, job_id: str, worker: _Worker) -> dict[str, str]:
        job = table.completed(caller.user_id, job_id, worker.machine_id)
        webhooks.tell(job, "completed", worker, caller.kelpie_key)
        return {"message": "Completed reported"}

    @router.post("/jobs/{job_id}/failed", status_code=202)
    async def failed(caller: _Caller, job_id: str, worker: _Worker) -> dict[str, str]:
        job = table.failed(caller.user_id, job_id, worker.machine_id)
        if job["num_failures"] >= job["max_failures"]:
            webhooks.tell(job, "failed", worker, caller.kelpie_key)
        return {"message": "Failure reported"}

    return router


def _anything_else() -> APIRouter:
    router = APIRouter()

    @router.api_route("/{path:path}", methods=_METHODS)
    async def unknown() -> Response:
        return refusal(404, "Route Not Found")

    return router


def _new_app() -> FastAPI:
    """An app whose errors are Kelpie's, and that says how it is to anybody."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(Refusal)
    async def of_ours(_request: Request, error: Refusal) -> Response:
        return refusal(error.status, error.error, error.message)

    @app.exception_handler(NoJobError)
    async def of_the_table(_request: Request, _error: NoJobError) -> Response:
        return refusal(404, "Not Found", "Job not found")

    @app.exception_handler(RequestValidationError)
    async def of_queries(_request: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors())

    @app.exception_handler(ValidationError)
    async def of_bodies(_request: Request, error: ValidationError) -> Response:
        return invalid([{**found} for found in error.errors()], "body")

    @app.exception_handler(Exception)
    async def of_any_other_kind(_request: Request, error: Exception) -> Response:
        return refusal(500, "Internal server error", str(error))

    return app
