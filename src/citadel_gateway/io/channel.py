"""Questions, answers and news between a supervisor and a worker, over a pair of sockets.

A message is a JSON object behind its length in four bytes.  When one process is gone, the kernel
closes its end, and the other one reads that: nobody outlives its partner without knowing it.
"""

from __future__ import annotations

import itertools
import math
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import attrs
import orjson
import trio

_LENGTH = struct.Struct(">I")
_READ = 64 * 1024
_NEWS = 0  # in place of a question's number


class NoAnswer(Exception):
    """It did not come in time, or there is nobody any more who could give it."""


@attrs.define(eq=False)
class _Question:
    answered: trio.Event = attrs.field(factory=trio.Event)
    answer: Any = None
    is_answered: bool = False


@attrs.define(eq=False)
class Channel:
    """One end.

    :param on_news: told what the other end says without wanting an answer, in order.
    :param answer: answers questions, several at once.  Exceptions are its own affair: one that
        escapes it ends :meth:`run`.
    """

    sock: socket.socket
    on_news: Callable[[str, Any], None]
    answer: Callable[[str, Any], Awaitable[Any]]
    _outbox: trio.MemorySendChannel[bytes] = attrs.field(init=False)
    _to_send: trio.MemoryReceiveChannel[bytes] = attrs.field(init=False)
    _numbers: itertools.count[int] = attrs.field(factory=lambda: itertools.count(1), init=False)
    _asked: dict[int, _Question] = attrs.field(factory=dict, init=False)
    _written: trio.Event = attrs.field(factory=trio.Event, init=False)
    _gone: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._outbox, self._to_send = trio.open_memory_channel[bytes](math.inf)

    def tell(self, what: str, body: Any = None) -> None:
        """Say something that needs no answer; waits for nobody, and gets there if it can."""
        self._post({"n": _NEWS, "what": what, "body": body})

    async def ask(self, what: str, body: Any = None, *, within: float) -> Any:
        """What the other end answers.  Raises :class:`NoAnswer`."""
        number, question = next(self._numbers), _Question()
        self._asked[number] = question
        try:
            self._post({"n": number, "what": what, "body": body})
            with trio.move_on_after(within):
                if not self._gone:
                    await question.answered.wait()
            if not question.is_answered:
                raise NoAnswer(what)
            return question.answer
        finally:
            del self._asked[number]

    async def run(self) -> None:
        """Until the other end has gone."""
        with self.sock:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(self.sock))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream)
                try:
                    await self._read(stream, nursery)
                finally:
                    self._gone = True
                    self._written.set()
                    for question in self._asked.values():
                        question.answered.set()
                nursery.cancel_scope.cancel()

    async def finish(self) -> None:
        """Say no more, and wait until all that was said is on its way; the caller bounds it."""
        self._outbox.close()
        await self._written.wait()

    def _post(self, message: dict[str, Any]) -> None:
        data = orjson.dumps(message)
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            self._outbox.send_nowait(_LENGTH.pack(len(data)) + data)

    async def _write(self, stream: trio.SocketStream) -> None:
        async for data in self._to_send:
            try:
                await stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break  # whoever reads finds that out, too
        self._written.set()

    async def _read(self, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        unread = bytearray()
        while True:
            try:
                data = await stream.receive_some(_READ)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            unread += data
            while (message := _take(unread)) is not None:
                self._deal_with(message, nursery)

    def _deal_with(self, message: dict[str, Any], nursery: trio.Nursery) -> None:
        number, body = message["n"], message["body"]
        if "what" not in message:
            if question := self._asked.get(number):
                question.answer, question.is_answered = body, True
                question.answered.set()
        elif number == _NEWS:
            self.on_news(message["what"], body)
        else:
            nursery.start_soon(self._reply, number, message["what"], body)

    async def _reply(self, number: int, what: str, body: Any) -> None:
        self._post({"n": number, "body": await self.answer(what, body)})


def _take(unread: bytearray) -> dict[str, Any] | None:
    """The first message of *unread*, and it is no longer there; ``None`` if it is not whole."""
    if len(unread) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(unread)
    end = _LENGTH.size + length
    if len(unread) < end:
        return None
    message: dict[str, Any] = orjson.loads(bytes(unread[_LENGTH.size : end]))
    del unread[:end]
    return message


def first_news(sock: socket.socket) -> Any:
    """The first thing that the other end says; blocks until it is there.  Raises ``EOFError``."""
    unread = bytearray()
    wanted = _LENGTH.size
    while (message := _take(unread)) is None:
        if len(unread) >= _LENGTH.size:
            wanted = _LENGTH.size + _LENGTH.unpack_from(unread)[0]
        data = sock.recv(wanted - len(unread))  # not a byte of what follows
        if not data:
            raise EOFError("the supervisor has gone")
        unread += data
    return message["body"]
