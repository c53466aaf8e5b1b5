"""Comments to a client who waits for its stream, so that nothing between us hangs up on it.

Proxies and clients take a silent connection for a dead one.  A comment says that it is not, and
means nothing else.  Before the first token it costs the chance of an honest status: the head has to
be sent for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import attrs
import trio

from citadel_gateway.io.nurseries import one_cancellation
from citadel_gateway.io.stream_relay import Sink

COMMENT = b": keep-alive\n\n"

T = TypeVar("T")


@attrs.define(eq=False)
class WaitingSink:
    """A sink that somebody waits at; the first thing that is written ends the waiting.

    :param begun: its head has been sent by an earlier attempt.
    """

    sink: Sink
    begun: bool
    _over: bool = attrs.field(default=False, init=False)
    _writing: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    @property
    def takes_at_once(self) -> bool:
        return self.sink.takes_at_once

    def write_now(self, data: bytes) -> bytes:
        return self.sink.write_now(data)

    async def write_rest(self, rest: bytes) -> None:
        await self.sink.write_rest(rest)

    async def start_early(self, data: bytes) -> None:
        await self.sink.start_early(data)

    async def start(self, data: bytes) -> None:
        await self.end_waiting()
        if self.begun:
            await self.sink.write(data)
        else:
            await self.sink.start(data)

    async def write(self, data: bytes) -> None:
        await self.end_waiting()
        await self.sink.write(data)

    async def finish(self, data: bytes) -> None:
        await self.end_waiting()
        await self.sink.finish(data)

    async def comment(self, every: float) -> None:
        """Say that we are there, whenever *every* seconds have passed without a word."""
        is_silent = not self.begun
        while True:
            await trio.sleep(every)
            async with self._writing:
                if self._over:
                    return
                if is_silent:
                    is_silent = False
                    await self.sink.start_early(COMMENT)
                else:
                    await self.sink.write(COMMENT)

    async def end_waiting(self) -> None:
        """No more comments from now on; one that is on its way arrives."""
        if not self._over:
            self._over = True
            async with self._writing:  # a comment may be on its way to a client that reads slowly
                pass


async def kept_alive(
    sink: Sink, every: float | None, work: Callable[[Sink], Awaitable[T]], *, begun: bool
) -> T:
    """Do *work* with *sink*, where a comment is written every so many seconds until it begins.

    :param every: ``None`` for no comments.
    :param begun: the head of the stream is out already.
    """
    waiting = WaitingSink(sink, begun)
    if every is None:
        return await work(waiting)
    failure: Exception | None = None
    with one_cancellation():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting.comment, every)
            try:
                result = await work(waiting)
            except Exception as exc:
                failure = exc  # out of the nursery, which would wrap it in a group
                await waiting.end_waiting()  # behind half a comment nobody could say what is wrong
            nursery.cancel_scope.cancel(reason="nobody waits any more")
    if failure is not None:
        raise failure
    return result
