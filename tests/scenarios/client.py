"""The client's ledger: what one request came to, from the bytes alone."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import attrs
import trio

from tests.scenarios.speech import TEXT
from tests.support.raw_client import NoResponseError, RawClient, RawResponse, http_request

CHAT = "/v1/chat/completions"


class End(enum.Enum):
    """How a request ended, for somebody who knows the answer that was due."""

    WHOLE = "whole"  # every byte of the answer, its finish_reason, and the end of the body
    REFUSED = "refused"  # an error status
    BROKEN = "broken"  # a good status, and then an error or a cut that any client notices
    TRUNCATED = "truncated"  # a part of the answer that looks like all of it
    WRONG = "wrong"  # text that is not the answer's
    SILENT = "silent"  # no end within the client's patience
    LEFT = "left"  # the client hung up, as it was told to


@attrs.define(eq=False, kw_only=True)
class Told:
    """What a client was told.  Times are Trio's, in real seconds.

    :param error: the error of a refusal, or of an event inside a stream.
    :param nonsense: events that are no JSON.
    :param complete: the body came to its own end.
    :param gap: the longest silence between two pieces of text.
    :param left_at: when the client hung up, as it was told to.
    """

    began: float
    ended: float = 0.0
    status: int | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    text: str = ""
    finish: str | None = None
    done: bool = False
    error: Any = None
    nonsense: int = 0
    complete: bool = False
    model: str | None = None
    usage: dict[str, Any] | None = None
    first: float | None = None
    gap: float = 0.0
    gave_up: bool = False
    left_at: float | None = None
    _last: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def end(self) -> End:
        if self.left_at is not None:
            return End.LEFT
        if self.gave_up:
            return End.SILENT
        if self.status is None:
            return End.BROKEN
        if self.status != 200:
            return End.REFUSED
        if not TEXT.startswith(self.text):
            return End.WRONG
        if self.error is not None or not self.complete:
            return End.BROKEN
        return End.WHOLE if self.text == TEXT and self.finish else End.TRUNCATED

    @property
    def code(self) -> str | None:
        """The `code` of the error, if there is one."""
        return self.error.get("code") if isinstance(self.error, dict) else None

    def read_event(self, data: str, now: float) -> None:
        if data.strip() == "[DONE]":
            self.done = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            self.nonsense += 1
            return
        if not isinstance(event, dict):
            self.nonsense += 1
            return
        if event.get("error"):
            self.error = event["error"]
            return
        self._read_answer(event, "delta", now)

    def read_whole(self, body: bytes, now: float) -> None:
        try:
            answer = json.loads(body)
        except ValueError:
            self.nonsense += 1
            return
        if not isinstance(answer, dict):
            self.nonsense += 1
        elif answer.get("error"):
            self.error = answer["error"]
        else:
            self._read_answer(answer, "message", now)

    def _read_answer(self, answer: dict[str, Any], part: str, now: float) -> None:
        self.model = answer.get("model") or self.model
        self.usage = answer.get("usage") or self.usage
        for choice in answer.get("choices") or []:
            self.finish = choice.get("finish_reason") or self.finish
            if text := (choice.get(part) or {}).get("content"):
                self._hear(text, now)

    def _hear(self, text: str, now: float) -> None:
        if self.first is None:
            self.first = now
        else:
            self.gap = max(self.gap, now - self._last)
        self._last = now
        self.text += text


async def ask(
    port: int,
    body: Mapping[str, Any],
    *,
    key: str,
    patience: float,
    leave_when: Callable[[Told], bool] = lambda _: False,
    leave_on: trio.Event | None = None,
    notice: Callable[[Told], object] = lambda _: None,
) -> Told:
    """One request over a connection of its own; whatever happens is in what is returned.

    :param patience: real seconds, after which the client gives up.
    :param leave_when: asked after each event of a stream; true hangs up.
    :param leave_on: hangs up when it is set, whatever has arrived.
    :param notice: told of each event of a stream.
    """
    told = Told(began=trio.current_time())
    headers = [("authorization", f"Bearer {key}"), ("accept", "*/*")]
    request = http_request("POST", CHAT, dict(body), headers)

    async def converse() -> None:
        async with await RawClient.connect(port) as client:
            await client.send(request)
            head = await client.read_head("POST")
            told.status, told.headers = head.status, dict(head.headers)
            if (head.header("content-type") or "").startswith("text/event-stream"):
                await _read_stream(client, head, told, leave_when, notice)
            else:
                await _read_whole(client, told)

    async def leave(scope: trio.CancelScope, event: trio.Event) -> None:
        await event.wait()
        told.left_at = trio.current_time()
        scope.cancel()

    with trio.move_on_after(patience) as waiting:
        async with trio.open_nursery() as nursery:
            if leave_on is not None:
                nursery.start_soon(leave, nursery.cancel_scope, leave_on)
            # That the answer is not complete, `told` says.
            with suppress(NoResponseError, OSError, ValueError, trio.BrokenResourceError):
                await converse()
            nursery.cancel_scope.cancel()
    told.gave_up = waiting.cancelled_caught
    told.ended = trio.current_time()
    return told


async def _read_stream(
    client: RawClient,
    head: RawResponse,
    told: Told,
    leave_when: Callable[[Told], bool],
    notice: Callable[[Told], object],
) -> None:
    events = client.read_events(head)
    async for data in events:
        told.read_event(data, trio.current_time())
        notice(told)
        if leave_when(told):
            told.left_at = trio.current_time()
            return
    told.complete = client.complete


async def _read_whole(client: RawClient, told: Told) -> None:
    body = bytearray()
    while piece := await client.read_piece():
        body += piece
    told.complete = client.complete
    if told.complete or told.status != 200:
        told.read_whole(bytes(body), trio.current_time())
