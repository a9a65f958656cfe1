"""How Kelpie's API says no: errors of its own code as JSON that calls itself text, those of its framework as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response

_CODES = {
    "literal_error": "invalid_enum_value",
    "greater_than_equal": "too_small",
    "too_short": "too_small",
    "less_than_equal": "too_big",
    "too_long": "too_big",
    "missing": "invalid_type",
    "json_invalid": "invalid_type",
}
"""The framework's code of each of pydantic's errors, besides those that end in `_type` and `_parsing`."""


class Refusal(Exception):  # noqa: N818 - it is an answer
    """Ends a request with an error of the API's own code."""

    def __init__(self, status: int, error: str, message: str) -> None:
        self.status = status
        self.error = error
        self.message = message
        super().__init__(message)


def refusal(status: int, error: str, message: str | None = None) -> Response:
    """An error of the API's own code."""
    content = {"error": error} if message is None else {"error": error, "message": message}
    return JSONResponse(content, status, media_type="text/plain;charset=UTF-8")


def invalid(errors: Iterable[Mapping[str, Any]], *place: str) -> Response:
    """A request that fails validation.

    Args:
        errors: Pydantic's.
        place: Where they are: `body`, unless their own places say it.
    """
    found = [_error(error, [*place, *error["loc"]]) for error in errors]
    return JSONResponse({"errors": found, "success": False, "result": {}}, 400)


def _error(error: Mapping[str, Any], path: list[str | int]) -> dict[str, Any]:
    kind = str(error["type"])
    known = "invalid_type" if kind.endswith(("_type", "_parsing")) else "custom"
    message = "Required" if kind == "missing" else str(error["msg"])
    return {"code": _CODES.get(kind, known), "message": message, "path": path}
