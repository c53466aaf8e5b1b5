"""One request to one endpoint: a connection, the clocks, and one kind of failure.

One deadline moves from phase to phase, so there is no timer per read.  When it comes, the wait for
the upstream is interrupted; nothing else here waits for long.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import attrs
import trio

from citadel_gateway.io.connection import Connection, Interrupted
from citadel_gateway.io.deadlines import Deadline, Deadlines
from citadel_gateway.io.dial import Origin
from citadel_gateway.io.failures import UpstreamFailure, from_clock, from_exception, from_status
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.record import Phase, nobody_to_hang_up_on
from citadel_gateway.io.target import Call, Target, Timing
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.retry import Judgement, Retry
from citadel_gateway.wire.headers import Headers, first
from citadel_gateway.wire.http1_response import BadResponse, CutShort
from citadel_gateway.wire.openai_answer import EngineError, NotAnAnswer
from citadel_gateway.wire.sse import EventTooLarge

T = TypeVar("T")

MAX_ERROR_BODY = 256 * 1024
AFTER_DONE = 0.05  # for the end of a body whose last event was already here


class Progress(Protocol):
    """Where the request is, kept up to date for whoever asks later.

    ``hang_up`` ends its connection to the upstream at once, if it has one.
    """

    phase: Phase
    upstream_wait: float
    held: int  # bytes of the common budget
    hang_up: Callable[[], None]


@attrs.define(eq=False)
class Attempt:
    """The life of one attempt."""

    pool: ConnectionPool
    deadlines: Deadlines
    target: Target
    call: Call
    timing: Timing
    progress: Progress
    committed: bool = False
    _connection: Connection | None = attrs.field(default=None, init=False)
    _deadline: Deadline = attrs.field(init=False)
    _struck: bool = attrs.field(default=False, init=False)
    _paused: bool = attrs.field(default=False, init=False)
    _dialling: trio.CancelScope | None = attrs.field(default=None, init=False)
    _clock: str = attrs.field(default="connect", init=False)
    _allowed: float = attrs.field(default=0.0, init=False)
    _final: bool = attrs.field(default=False, init=False)  # the clock is the request's deadline
    _last: float = attrs.field(default=math.inf, init=False)  # when all must be here
    _sent: bool = attrs.field(default=False, init=False)
    _sent_at: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._deadline = self.deadlines.add(self._strike)

    async def run(self, use: Callable[[Connection], Awaitable[T]]) -> T:
        """Send the request and *use* the connection once the head of a good answer is there.

        Whatever goes wrong is raised as :class:`UpstreamFailure`.
        """
        try:
            connection = await self._send()
            if connection.response.status != 200:
                raise await _refused(connection)
            _check_is_plain(connection.response.headers)
            return await use(connection)
        except UpstreamFailure as failure:
            failure.committed = self.committed
            raise
        except Interrupted:
            timed_out = self._timed_out()
            timed_out.committed = self.committed
            raise timed_out from None
        except (EngineError, NotAnAnswer, EventTooLarge, BadResponse, OSError) as exc:
            translated = from_exception(exc, sent=self._sent)
            translated.committed = self.committed
            raise translated from exc
        finally:
            self.deadlines.discard(self._deadline)
            await self._let_go()

    def _strike(self) -> None:
        if self._paused:
            return
        self._struck = True
        if self._connection is not None:
            self._connection.interrupt()
        elif self._dialling is not None:
            self._dialling.cancel()

    # The clocks that run once the head is there; :meth:`run` has the ones before.

    def expect_whole(self) -> None:
        self._start_clock("total", math.inf, self._sent_at)

    def expect_first_token(self) -> None:
        self._start_clock("first_token", self.timing.first_token, self._sent_at)

    def expect_more(self) -> None:
        """The next read of a stream is due; called again after each."""
        timing, now = self.timing, trio.current_time()
        due = now + timing.idle
        self._final = self._paused = False
        self._clock, self._allowed = "idle", timing.idle
        self._last = self._sent_at + timing.total
        if due > self._last:
            due = self._last
            self._clock, self._allowed = "total", timing.total
        self._move_deadline(due)

    def has_more(self, now: float) -> None:
        """The same while nothing but time has changed since :meth:`expect_more`."""
        due = now + self.timing.idle
        if due > self._last:
            self.expect_more()  # another clock, then
        else:
            self._deadline.due = due  # later than it was, so nobody need be told

    def pause_clock(self) -> None:
        """Somebody else's turn to be slow: the client's.  Until :meth:`expect_more`.

        If the clock has struck in this very tick, that is when it is raised: what the upstream has
        said until then belongs to the client, if it has been given anything.
        """
        self._paused = True

    def stop_clock(self) -> None:
        """The same before the client is given anything."""
        self._paused = True
        if self._struck:
            raise self._timed_out()

    def note_wait(self, connection: Connection) -> None:
        """Add to the books how long the upstream has kept us waiting."""
        self.progress.upstream_wait += connection.waited
        connection.waited = 0.0

    async def _send(self) -> Connection:
        connection = await self._connect()
        try:
            await self._exchange(connection)
        except (CutShort, OSError) as exc:
            if not connection.is_reused or connection.response.started:
                raise
            failure = from_exception(exc, sent=True)
            failure.stale = True
            failure.judgement = Judgement(Retry.AMBIGUOUS, Verdict.NO_OPINION)
            raise failure from exc
        return connection

    async def _connect(self) -> Connection:
        origin = self.target.origin
        connection = None if self.call.fresh else await self.pool.reuse(origin)
        if connection is None:
            connection = await self._dial(origin)
        self._connection = connection
        self.progress.hang_up = connection.hang_up
        return connection

    async def _dial(self, origin: Origin) -> Connection:
        self.progress.phase = Phase.CONNECTING
        began = trio.current_time()
        self._start_clock("connect", self.timing.connect, began)
        try:
            with trio.CancelScope() as self._dialling:
                return await self.pool.open(origin)
            raise self._timed_out()
        finally:
            self._dialling = None
            self.progress.upstream_wait += trio.current_time() - began

    async def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self.progress.hang_up = nobody_to_hang_up_on
            self.note_wait(connection)
            if connection.is_ending:
                self._bound_the_end(connection)
            await self.pool.release(connection)

    def _bound_the_end(self, connection: Connection) -> None:
        """Whoever does not end after the end is hung up on, lest he believes that we listen."""

        def ring(request: int = connection.requests) -> None:
            self.deadlines.discard(deadline)
            connection.give_up_the_end(request)

        deadline = self.deadlines.add(ring)
        self.deadlines.move(deadline, trio.current_time() + AFTER_DONE)

    async def _exchange(self, connection: Connection) -> None:
        self.progress.phase = Phase.WAITING
        now = trio.current_time()
        self._start_clock("headers", self.timing.headers, now)
        self._sent, self._sent_at = True, now
        try:
            await connection.send(self.call.encode(self.target))
        except OSError as exc:
            # It may have refused the request while we were still sending: that answer counts.
            try:
                await connection.read_head()
            except (BadResponse, OSError):
                raise exc from None
        else:
            await connection.read_head()

    def _start_clock(self, name: str, allowed: float, since: float) -> None:
        """Give the upstream *allowed* seconds, but no more than the request has."""
        timing = self.timing
        due = since + allowed
        self._move_deadline(min(due, timing.deadline))
        self._final = due >= timing.deadline
        if self._final:
            name = "first_token" if self.call.request.stream else "total"
            allowed = timing.allowed
        self._clock, self._allowed = name, allowed

    def _move_deadline(self, to: float) -> None:
        if self._struck:
            # In the very tick in which the upstream spoke.
            raise self._timed_out()
        self.deadlines.move(self._deadline, to)

    def _timed_out(self) -> UpstreamFailure:
        return from_clock(
            self._clock,
            self._allowed,
            sent=self._sent,
            final=self._final,
            shortened=self.timing.shortened,
        )


async def read_all(connection: Connection, limit: int) -> bytes:
    """The rest of a body.  Raises :class:`BadResponse` if it is larger than *limit*."""
    pieces, size = [], 0
    while piece := await connection.read_body():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise BadResponse(f"the upstream's answer is larger than {limit} bytes")
    return b"".join(pieces)


def _check_is_plain(headers: Headers) -> None:
    if first(headers, b"content-encoding") not in {None, b"identity"}:
        raise NotAnAnswer("the upstream's answer is compressed")


async def _refused(connection: Connection) -> UpstreamFailure:
    """The failure behind a status other than 200."""
    try:
        body = await read_all(connection, MAX_ERROR_BODY)
    except (BadResponse, OSError):
        body = b""  # the status has said what matters
    return from_status(connection.response.status, connection.response.headers, body)
