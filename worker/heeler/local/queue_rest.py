"""The public REST calls to create queues and jobs, list, get and cancel them, as users of `salad-cloud-sdk` know them.

Paths, fields, patterns and statuses are those of Salad's published description; what it leaves open: jobs are listed
oldest first, 25 a page, and to cancel a job that has ended changes nothing. A queue's container groups are not shown.
"""

from __future__ import annotations

import hmac
import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Response
from pydantic import BaseModel, Field

from heeler.local.queue_model import ExistsError, Job, NotFoundError, Queue, QueueName
from heeler.local.queue_resources import job_resource, queue_resource
from heeler.local.queue_state import QueueState
from heeler.local.web import Problem, new_app
from heeler.local.webhooks import Webhooks
from heeler.wire.salad_queue import MESSAGE_BYTES

BASE = "/api/public"
_FRAME_BYTES = 4096
"""More than a job's message has besides its input."""
_NAME = "^[a-z][a-z0-9-]{0,61}[a-z0-9]$"
_DISPLAY_NAME = Annotated[str, Field(min_length=2, max_length=63, pattern="^[ ,-.0-9A-Za-z]+$")]
_DESCRIPTION = Annotated[str, Field(max_length=500, pattern="^.*$")]
_Name = Annotated[str, Path(pattern=_NAME)]
_Page = Annotated[int, Query(ge=1, le=2147483647)]
_PageSize = Annotated[int, Query(ge=1, le=100)]


class QueuePrototype(BaseModel):
    """A queue to make."""

    name: Annotated[str, Field(pattern=_NAME)]
    display_name: _DISPLAY_NAME | None = None
    description: _DESCRIPTION | None = None


class QueuePatch(BaseModel):
    """What to change of a queue; null puts the default back."""

    display_name: _DISPLAY_NAME | None = None
    description: _DESCRIPTION | None = None


class JobPrototype(BaseModel):
    """A job to make."""

    input: Any
    metadata: dict[str, Any] | None = None
    webhook: Annotated[str, Field(min_length=1, max_length=2048)] | None = None


def create_app(state: QueueState, webhooks: Webhooks, api_key: str) -> FastAPI:
    """The public API.

    Args:
        state: The queues.
        webhooks: Whose secret key the API shows.
        api_key: The only key that is accepted.
    """

    async def authorize(salad_api_key: Annotated[str | None, Header()] = None) -> None:
        if salad_api_key is None:
            raise Problem(401, "the request has no header Salad-Api-Key")
        if not hmac.compare_digest(salad_api_key.encode(), api_key.encode()):
            raise Problem(403, "the API key is not valid")

    app = new_app()
    organization = BASE + "/organizations/{organization}"
    queues = organization + "/projects/{project}/queues"
    guarded = [Depends(authorize)]
    app.include_router(_queues(state), prefix=queues, dependencies=guarded)
    app.include_router(_jobs(state), prefix=queues + "/{queue}/jobs", dependencies=guarded)
    app.include_router(_secret_key(webhooks), prefix=organization + "/webhook-secret-key", dependencies=guarded)
    return app


def _queues(state: QueueState) -> APIRouter:
    router = APIRouter()

    @router.get("")
    async def list_queues(organization: _Name, project: _Name) -> dict[str, Any]:
        found = [queue for name, queue in state.queues.items() if name[:2] == (organization, project)]
        return {"items": [queue_resource(queue, state.waiting(queue.name)) for queue in found]}

    @router.post("", status_code=201)
    async def create_queue(organization: _Name, project: _Name, body: QueuePrototype) -> dict[str, Any]:
        name = QueueName(organization, project, body.name)
        try:
            queue = state.create_queue(name, display_name=body.display_name, description=body.description)
        except ExistsError as error:
            raise Problem(400, str(error)) from None
        return queue_resource(queue, state.waiting(queue.name))

    @router.get("/{queue}")
    async def get_queue(name: _QueueName) -> dict[str, Any]:
        return queue_resource(_existing(state, name), state.waiting(name))

    @router.patch("/{queue}")
    async def update_queue(name: _QueueName, body: QueuePatch) -> dict[str, Any]:
        _existing(state, name)
        queue = state.update_queue(name, body.model_dump(exclude_unset=True))
        return queue_resource(queue, state.waiting(name))

    @router.delete("/{queue}")
    async def delete_queue(name: _QueueName) -> Response:
        _existing(state, name)
        state.delete_queue(name)
        return Response(status_code=202)

    return router


def _jobs(state: QueueState) -> APIRouter:
    router = APIRouter()

    @router.get("")
    async def list_jobs(name: _QueueName, page: _Page = 1, page_size: _PageSize = 25) -> dict[str, Any]:
        _existing(state, name)
        found = state.jobs_of(name)[(page - 1) * page_size : page * page_size]
        return {"items": [job_resource(job) for job in found]}

    @router.post("", status_code=201)
    async def create_job(name: _QueueName, body: JobPrototype) -> dict[str, Any]:
        _existing(state, name)
        data = _input(body.input)
        return job_resource(state.submit(name, data, metadata=body.metadata, webhook=body.webhook))

    @router.get("/{job_id}")
    async def get_job(name: _QueueName, job_id: str) -> dict[str, Any]:
        return job_resource(_existing_job(state, name, job_id))

    @router.delete("/{job_id}")
    async def cancel_job(name: _QueueName, job_id: str) -> Response:
        state.cancel(_existing_job(state, name, job_id).id)
        return Response(status_code=202)

    return router


def _secret_key(webhooks: Webhooks) -> APIRouter:
    router = APIRouter()

    @router.get("")
    async def get_secret_key(organization: _Name) -> dict[str, str]:  # noqa: ARG001 - all share one
        return {"secret_key": webhooks.secret_key}

    @router.post("")
    async def new_secret_key(organization: _Name) -> dict[str, str]:  # noqa: ARG001
        webhooks.new_secret_key()
        return {"secret_key": webhooks.secret_key}

    return router


async def _queue_name(organization: _Name, project: _Name, queue: _Name) -> QueueName:
    return QueueName(organization, project, queue)


_QueueName = Annotated[QueueName, Depends(_queue_name)]


def _existing(state: QueueState, name: QueueName) -> Queue:
    try:
        return state.queue(name)
    except NotFoundError as error:
        raise Problem(404, str(error)) from None


def _existing_job(state: QueueState, name: QueueName, job_id: str) -> Job:
    _existing(state, name)
    try:
        job = state.job(job_id)
    except NotFoundError as error:
        raise Problem(404, str(error)) from None
    if job.queue != name:
        raise Problem(404, f"there is no job {job_id} in the queue {name.queue}")
    return job


def _input(value: Any) -> bytes:
    try:
        data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise Problem(400, "body.input: is not JSON") from None
    if len(data) + _FRAME_BYTES > MESSAGE_BYTES:
        raise Problem(400, f"body.input: has more than {MESSAGE_BYTES - _FRAME_BYTES} bytes")
    return data
