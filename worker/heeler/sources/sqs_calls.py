"""The calls to SQS (PROTOCOLS 4), by aioboto3, and what their failures mean. Nothing is tried again here."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aioboto3
import aiohttp
import anyio
from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from heeler.errors import UsageError
from heeler.sources.base import LeaseLostError, SourceUnavailableError

ENTRIES = 10
"""The most that one call takes or gives."""
_CALL_SECONDS = 10.0
_CONNECT_SECONDS = 5.0
_SLACK_SECONDS = 5.0
"""How much longer than asked a poll may take."""
_CONNECTIONS = 20
_NOT_OURS = {"ReceiptHandleIsInvalid", "InvalidParameterValue", "MessageNotInflight"}
"""How SQS says that a handle is no longer good: an invalid or an expired one, and a message that is visible again."""
_PASSING = {"InternalError", "InternalFailure", "OverLimit", "RequestTimeout", "ServiceUnavailable", "?", ""}
_OF_HANDLE = re.compile("receipt *handle", re.IGNORECASE)


class RefusedError(SourceUnavailableError):
    """SQS answered, and refused.

    Attributes:
        code: Why, in its own word, without what stands before the last dot.
        passes: Whether the same call may be taken later.
    """

    def __init__(self, call: str, code: str, words: str, *, passes: bool | None = None) -> None:
        """Args: the call, what SQS says, and whether that passes, where it is known otherwise than by the code."""
        self.code = code.rpartition(".")[2]
        self.passes = _passes(self.code) if passes is None else passes
        if _OF_HANDLE.search(words):
            words = ""  # they may quote it, and it is the right to change the message
        super().__init__(f"SQS refused {call} with {self.code}{words and ': '}{words}")


def _passes(code: str) -> bool:
    return code in _PASSING or "Throttl" in code or (code.isdigit() and int(code) >= 500)


@dataclass(frozen=True)
class Address:
    """Where the queue is, and who asks.

    Attributes:
        url: The queue's.
        region: To sign for.
        endpoint: Of the service; None for AWS's own.
        access_key_id: None takes what boto finds in the environment or on the machine.
        secret_access_key: As before.
        session_token: Of temporary keys.
    """

    url: str
    region: str
    endpoint: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    @property
    def fifo(self) -> bool:
        """Whether it is a FIFO queue, as its name says."""
        return self.url.endswith(".fifo")

    @property
    def name(self) -> str:
        """The queue's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Change:
    """One entry of a batch: a message's handle, and for how long to hide it (of a deletion nothing)."""

    handle: str = field(repr=False)
    seconds: int = 0


class SqsCalls:
    """The calls of one queue; good within `opened`. Each raises `SourceUnavailableError`."""

    def __init__(self, address: Address) -> None:
        """Args: where to, and as whom."""
        self.address = address
        self._client: Any = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections.

        Raises:
            UsageError: What boto finds in its own settings is wrong.
        """
        async with AsyncExitStack() as stack:
            try:
                self._client = await stack.enter_async_context(self._open())
            except (BotoCoreError, ValueError) as error:
                raise UsageError(f"the queue's client can't be made: {error}") from None
            yield

    def _open(self) -> Any:
        address = self.address
        session = aioboto3.Session(
            aws_access_key_id=address.access_key_id,
            aws_secret_access_key=address.secret_access_key,
            aws_session_token=address.session_token,
            region_name=address.region,
        )
        config = AioConfig(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=60,
            max_pool_connections=_CONNECTIONS,
            retries={"total_max_attempts": 1},
        )
        return session.client("sqs", endpoint_url=address.endpoint, config=config)

    async def receive(self, count: int, wait: int, visibility: int) -> list[dict[str, Any]]:
        """`ReceiveMessage`: up to `count` messages, as soon as there is one."""
        answer = await self._call(
            "receive_message",
            wait + _SLACK_SECONDS,
            QueueUrl=self.address.url,
            MaxNumberOfMessages=count,
            WaitTimeSeconds=wait,
            VisibilityTimeout=visibility,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
        )
        messages: list[dict[str, Any]] = answer.get("Messages", [])
        return messages

    async def hide(self, changes: Sequence[Change]) -> list[Exception | None]:
        """`ChangeMessageVisibilityBatch`: what became of each, None for success."""
        return await self._batch(
            "change_message_visibility_batch",
            changes,
            lambda change: {"ReceiptHandle": change.handle, "VisibilityTimeout": change.seconds},
        )

    async def delete(self, changes: Sequence[Change]) -> list[Exception | None]:
        """`DeleteMessageBatch`: what became of each, None for success."""
        return await self._batch("delete_message_batch", changes, lambda change: {"ReceiptHandle": change.handle})

    async def send(self, url: str, **message: Any) -> None:
        """`SendMessage`, to any queue."""
        await self._call("send_message", QueueUrl=url, **message)

    async def attributes(self, *names: str) -> dict[str, str]:
        """`GetQueueAttributes`."""
        answer = await self._call("get_queue_attributes", QueueUrl=self.address.url, AttributeNames=[*names])
        found: dict[str, str] = answer.get("Attributes", {})
        return found

    async def reach(self) -> None:
        """Return if SQS answers, whatever it says: for whom a receive that is answered too late would do harm."""
        with suppress(RefusedError):
            await self.attributes("QueueArn")

    async def url_of(self, arn: str) -> str:
        """`GetQueueUrl` of an ARN (arn:aws:sqs:REGION:ACCOUNT:NAME)."""
        account, name = arn.split(":")[-2:]
        answer = await self._call("get_queue_url", QueueName=name, QueueOwnerAWSAccountId=account)
        return str(answer["QueueUrl"])

    async def _batch(
        self, call: str, changes: Sequence[Change], entry: Callable[[Change], dict[str, Any]]
    ) -> list[Exception | None]:
        """Up to ten entries in one call; where it is refused as a whole for one entry's sake, each in its own."""
        entries = [{"Id": str(number), **entry(change)} for number, change in enumerate(changes)]
        try:
            answer = await self._call(call, QueueUrl=self.address.url, Entries=entries)
        except RefusedError as error:
            if error.code not in _NOT_OURS:
                raise
            if len(changes) == 1:
                return [LeaseLostError(str(error))]
            return [result for change in changes for result in await self._batch(call, [change], entry)]
        results: list[Exception | None] = [None] * len(changes)
        for failed in answer.get("Failed", []):
            refused = RefusedError(call, failed.get("Code", ""), failed.get("Message", ""))
            results[int(failed["Id"])] = LeaseLostError(str(refused)) if refused.code in _NOT_OURS else refused
        return results

    async def _call(self, call: str, seconds: float = _CALL_SECONDS, **parameters: Any) -> dict[str, Any]:
        try:
            with anyio.fail_after(seconds):
                answer: dict[str, Any] = await getattr(self._client, call)(**parameters)
        except ClientError as error:
            said = error.response.get("Error", {})
            raise RefusedError(call, said.get("Code", "?"), said.get("Message", "")) from None
        except TimeoutError:
            raise SourceUnavailableError(f"SQS did not answer {call} within {seconds:g} s") from None
        except (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError, ValueError) as error:
            raise SourceUnavailableError(f"SQS could not be asked ({call}): {error}") from None
        return answer
