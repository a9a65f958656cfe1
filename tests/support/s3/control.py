"""The control path: faults, counts and contents of the server, for tests in another process. Not signed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .body import Body, md5_of
from .errors import S3Error
from .faults import rule_from_json
from .messages import CONTROL, Request, Response
from .store import StoredObject

if TYPE_CHECKING:
    from .app import Application


def handle_control(app: Application, request: Request) -> Response:
    """Answer one control request.

    `GET|POST|DELETE /_control/faults`, `DELETE /_control/faults/{id}`, `POST /_control/faults/release`,
    `GET|DELETE /_control/stats` (`?log=1` with the log), `GET /_control/health`,
    `GET /_control/objects/{bucket}`, `GET /_control/uploads/{bucket}`, `PUT /_control/buckets/{bucket}`,
    `GET|PUT /_control/object/{bucket}/{key}`.

    Raises:
        S3Error: the request can't be understood, or there is no such bucket or key.
    """
    path = request.key
    what, _, rest = path.partition("/")
    method = f"{request.method} {what}"
    if method == "GET health":
        return _json({"ok": True, "errors": [repr(error) for error in app.internal_errors]})
    if what == "faults":
        return _faults(app, request, rest)
    if method == "GET stats":
        return _json(app.stats.snapshot().as_json(log="log" in request.query))
    if method == "DELETE stats":
        app.stats.reset()
        return Response(204)
    return _contents(app, request, method, rest)


def _faults(app: Application, request: Request, rest: str) -> Response:
    rules = {str(rule.rule_id): rule for rule in app.faults.rules()}
    if request.method == "GET":
        return _json([rule.as_json() for rule in rules.values()])
    if request.method == "POST" and rest == "release":
        for rule in rules.values():
            rule.release()
        return Response(204)
    if request.method == "POST" and not rest:
        try:
            action, match = rule_from_json(json.loads(bytes(request.body)))
        except ValueError as error:
            raise S3Error("InvalidArgument", str(error)) from None
        return _json(app.faults.add(action, **match).as_json())
    if request.method == "DELETE" and not rest:
        app.faults.clear()
        return Response(204)
    if request.method == "DELETE" and rest in rules:
        app.faults.remove(rules[rest])
        return Response(204)
    raise S3Error("InvalidArgument", f"no such fault rule: {rest}", status=404)


def _contents(app: Application, request: Request, method: str, rest: str) -> Response:
    store = app.store
    if method == "PUT buckets":
        store.create_bucket(rest)
        return Response(204)
    bucket, _, key = rest.partition("/")
    if method == "GET objects":
        with store.lock:
            found = store.bucket(bucket)
            return _json({key: _described(found.objects[key]) for key in found.keys})
    if method == "GET uploads":
        with store.lock:
            uploads = store.bucket(bucket).uploads.values()
            return _json(
                [{"key": each.key, "upload_id": each.upload_id, "parts": sorted(each.parts)} for each in uploads]
            )
    if method == "GET object":
        return Response(200, store.get(bucket, key).body)
    if method == "PUT object":
        put_directly(app, bucket, key, request.body)
        return Response(204)
    raise S3Error("InvalidArgument", f"no such control request: {method}", status=404)


def put_directly(app: Application, bucket: str, key: str, body: Body) -> StoredObject:
    """Write an object as the test's own, past limits and conditions."""
    etag = app.store.unique() if app.rules.opaque_etags else md5_of(body)
    stored = StoredObject(body, etag, app.store.now())
    app.store.put(bucket, key, stored, limited=False)
    return stored


def _described(stored: StoredObject) -> dict[str, Any]:
    return {
        "size": stored.body.size,
        "etag": stored.etag,
        "modified": stored.modified,
        "headers": stored.headers,
    }


def _json(data: Any) -> Response:
    return Response(200, json.dumps(data).encode(), {"Content-Type": "application/json"})


__all__ = ["CONTROL", "handle_control", "put_directly"]
