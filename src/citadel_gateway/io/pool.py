"""Connections to upstreams that are kept for the next request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio
import attrs
from anyio.abc import ByteStream

from citadel_gateway.io.connection import Connection
from citadel_gateway.io.dial import Connect, Origin


@attrs.define(eq=False)
class ConnectionPool:
    """Idle connections by origin; last in, first out, so that surplus ones grow old and expire.

    The pool does not limit how many connections are in use: whoever sends requests has slots for
    that, and a second limit here could only dead-lock with it.  Checking out is O(1).

    :param is_current: whether the other end of a stream is still where its origin's name points;
        asked before a connection is used again.
    :param keepalive: seconds that an idle connection is kept.  Below the five seconds after which
        uvicorn hangs up (vLLM, SGLang), so that we are always the first to close.
    :param most_idle: idle connections kept for each origin.
    """

    connect: Connect
    clock: Callable[[], float] = anyio.current_time
    keepalive: float = 3.0
    most_idle: int = 256
    is_current: Callable[[ByteStream], bool] = lambda _: True
    _idle: dict[Origin, deque[Connection]] = attrs.field(factory=dict, init=False)
    _open: set[Connection] = attrs.field(factory=set, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    async def acquire(self, origin: Origin, *, fresh: bool = False) -> Connection:
        """A connection to *origin*, to be given back with :meth:`release`.

        Raises ``OSError`` when a new one cannot be opened.

        :param fresh: open a new one even if an idle one is there.
        """
        reused = None if fresh else await self.reuse(origin)
        return reused or await self.open(origin)

    async def reuse(self, origin: Origin) -> Connection | None:
        """An idle connection to *origin*, if there is a good one; waits for nobody."""
        idle = self._idle.get(origin)
        ending: tuple[Connection, ...] = ()  # they have a moment yet to come to their ends
        found = None
        while idle and found is None:
            connection = idle.pop()
            if connection.is_ending and not connection.has_ended():
                ending = (connection, *ending)
            elif (
                self.clock() - connection.idle_since < self.keepalive
                and self.is_current(connection.stream)
                and not connection.is_stale()
                and not connection.response.surplus
            ):
                found = connection
            else:
                await self._discard(connection)
        if idle is not None:
            idle.extend(ending)
        return found

    async def open(self, origin: Origin) -> Connection:
        """A new connection to *origin*.  Raises ``OSError`` when it cannot be opened."""
        return self._adopt(origin, await self._dial(origin))

    async def release(self, connection: Connection) -> None:
        """Keep the connection if it is good for another request, else close it at once."""
        idle = self._idle.get(connection.origin)
        if idle is None:
            idle = self._idle[connection.origin] = deque()
        is_good = connection.is_ending or connection.is_reusable()
        if self._closed or not is_good or len(idle) >= self.most_idle:
            await self._discard(connection)
            return
        connection.idle_since = self.clock()
        idle.append(connection)

    async def prune(self) -> None:
        """Close the connections that have been idle for too long."""
        oldest = self.clock() - self.keepalive
        for origin, idle in list(self._idle.items()):
            while idle and idle[0].idle_since <= oldest:
                await self._discard(idle.popleft())
            if not idle:
                self._idle.pop(origin, None)

    async def aclose(self) -> None:
        """Close every connection, in use or not; the pool opens no more."""
        self._closed = True
        self._idle.clear()
        for connection in list(self._open):
            await self._discard(connection)

    @property
    def open_count(self) -> int:
        """Connections that exist: idle and in use."""
        return len(self._open)

    @property
    def idle_count(self) -> int:
        return sum(len(idle) for idle in self._idle.values())

    async def _dial(self, origin: Origin) -> ByteStream:
        if self._closed:
            raise RuntimeError("the pool is closed")
        return await self.connect(origin)

    def _adopt(self, origin: Origin, stream: ByteStream) -> Connection:
        # No await between the stream's birth and its entry here: a cancellation cannot lose it.
        connection = Connection(origin, stream, self.clock)
        self._open.add(connection)
        return connection

    async def _discard(self, connection: Connection) -> None:
        self._open.discard(connection)
        await connection.aclose()
