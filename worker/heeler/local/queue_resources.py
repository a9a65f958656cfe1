"""Queues and jobs as the public REST API shows them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from heeler.local.queue_model import Job, Queue


def queue_resource(queue: Queue, waiting: int) -> dict[str, Any]:
    """A queue as the public API shows it.

    Args:
        queue: The queue.
        waiting: How many of its jobs wait for a worker.
    """
    resource = {
        "id": queue.id,
        "name": queue.name.queue,
        "display_name": queue.display_name,
        "container_groups": [],
        "create_time": _time(queue.created),
        "update_time": _time(queue.updated),
        "current_queue_length": waiting,
    }
    return resource if queue.description is None else {**resource, "description": queue.description}


def job_resource(job: Job) -> dict[str, Any]:
    """A job as the public API shows it; what it does not have is left out."""
    resource = {
        "id": job.id,
        "input": json.loads(job.input),
        "metadata": job.metadata,
        "webhook": job.webhook,
        "status": job.status.value,
        "events": [{"action": event.action.value, "time": _time(event.time)} for event in job.events],
        "create_time": _time(job.created),
        "update_time": _time(job.updated),
    }
    resource = {name: value for name, value in resource.items() if value is not None or name == "input"}
    return resource if job.output is None else {**resource, "output": _output(job.output)}


def _output(data: bytes) -> Any:
    """What a worker answered: JSON if it is, else a text."""
    try:
        value = json.loads(data, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")
