"""The server without its sockets: a request goes in, a response comes out."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass, field

from .auth import verify
from .control import handle_control
from .errors import S3Error
from .faults import Faults
from .handlers import OPERATIONS, Context
from .intake import Intake
from .messages import Request, Response, error_response
from .rules import Rules
from .stats import Record, Stats
from .store import Store


@dataclass
class Application:
    """Everything that the connections share."""

    rules: Rules
    store: Store
    access_key: str
    secret_key: str
    faults: Faults = field(default_factory=Faults)
    stats: Stats = field(default_factory=Stats)
    internal_errors: list[BaseException] = field(default_factory=list)
    """Errors of the server itself: its owner must look at them when it stops."""

    def handle(self, request: Request, intake: Intake) -> Response:
        """The effect of a request whose body has come, and its answer."""
        try:
            response = self._act(request, intake)
        except S3Error as error:
            response = error_response(error, request)
        except Exception as error:  # noqa: BLE001 - kept for the owner, and answered as S3 does
            traceback.print_exc(file=sys.stderr)
            self.internal_errors.append(error)
            response = error_response(S3Error("InternalError"), request)
        if request.method == "HEAD":
            response.send_body = False
        return response

    def _act(self, request: Request, intake: Intake) -> Response:
        if request.operation == "Control":
            return handle_control(self, request)
        if self.rules.verify_signature:
            verify(
                request,
                self.access_key,
                self.secret_key,
                now=time.time(),
                max_skew=self.rules.max_clock_skew,
            )
        intake.finish()
        handler = OPERATIONS.get(request.operation)
        if handler is None:
            raise S3Error(request.operation)
        return handler(Context(self.store, self.rules), request)

    def record(self, request: Request, response: Response | None, *, bytes_out: int) -> Record | None:
        """Count and log a request, answered or (None) not; control requests aren't counted."""
        request.recorded = True
        if request.operation == "Control":
            return None
        headers = None
        if self.rules.log_headers:
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        return self.stats.add(
            Record(
                operation=request.operation,
                method=request.method,
                bucket=request.bucket,
                key=request.key,
                part_number=request.part_number,
                status=response.status if response is not None else 0,
                code=response.code if response is not None else "",
                bytes_in=request.bytes_in,
                bytes_out=bytes_out,
                started=request.started,
                seconds=time.monotonic() - request.started,
                query=request.raw_query,
                headers=headers,
            )
        )
