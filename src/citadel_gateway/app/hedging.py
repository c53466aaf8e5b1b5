"""Two attempts at one stream: whoever has the first content goes on, the other is called off.

The commit point decides, as nothing has reached the client before it, and everything after it has
to come from one endpoint.  Until then each attempt keeps a record of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

import attrs
import trio

from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.nurseries import one_cancellation
from citadel_gateway.io.record import RequestRecord, nobody_to_hang_up_on
from citadel_gateway.io.stream_relay import Sink
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.hedging import HedgeResult, Hedging
from citadel_gateway.policy.waitroom import Ticket

J = TypeVar("J")


@attrs.define(eq=False, kw_only=True)
class Runner(Generic[J]):
    """One of the attempts.

    :param ticket: has its slot.
    :param record: its own.
    :param journey: what whoever makes the attempt keeps for it.
    :param attempt: makes it, for a sink.
    """

    upstream: Upstream
    ticket: Ticket
    record: RequestRecord
    journey: J
    attempt: Callable[[Sink], Awaitable[object]]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    failure: UpstreamFailure | None = attrs.field(default=None, init=False)
    is_over: bool = attrs.field(default=False, init=False)

    def call_off(self) -> None:
        """Nobody waits for it any more, which its endpoint learns at once."""
        self.scope.cancel(reason="another attempt was quicker")


@attrs.define(eq=False, kw_only=True)
class Race(Generic[J]):
    """One request's attempt at a stream, and, if its first content is late, a second one.

    The request's ticket always has the slot of the one who leads: the winner, or until there is
    one the first, or the second when the first has failed.

    :param record: the request's, as is *ticket*.
    :param find_second: called when it is time; ``None`` if nobody can be asked.
    :param on_failure: told of an attempt that failed while the other one goes on.
    """

    sink: Sink
    record: RequestRecord
    ticket: Ticket
    admission: Admission
    hedging: Hedging
    first: Runner[J]
    find_second: Callable[[], Runner[J] | None]
    on_failure: Callable[[Runner[J], UpstreamFailure], None]
    leader: Runner[J] = attrs.field(init=False)
    _second: Runner[J] | None = attrs.field(default=None, init=False)
    _winner: Runner[J] | None = attrs.field(default=None, init=False)
    _began: float = attrs.field(factory=trio.current_time, init=False)
    _after: float | None = attrs.field(default=None, init=False)
    _crash: Exception | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.leader = self.first

    @property
    def result(self) -> HedgeResult | None:
        """What came of the second attempt; ``None`` if there was none."""
        if self._second is None:
            return None
        if self._second.failure is not None and self._winner is not self._second:
            return HedgeResult.FAILED
        match self._winner:
            case None:
                return HedgeResult.CANCELLED
            case self._second:
                return HedgeResult.WON
            case _:
                return HedgeResult.LOST

    async def run(self, after: float | None, deadlines: Deadlines) -> None:
        """Relay the stream to its end.  Raises ``UpstreamFailure``: what the last one failed of.

        :param after: seconds until it is time for a second attempt; ``None``: it never is.
        """
        self._after = after
        self.record.hang_up = self._hang_up
        try:
            if after is None:
                await self._run(self.first)
            else:
                await self._run_both(after, deadlines)
        finally:
            self.record.hang_up = nobody_to_hang_up_on
            self.record.adopt(self.leader.record)
        if self._crash is not None:
            raise self._crash
        if self.leader.failure is not None:
            raise self.leader.failure

    async def _run_both(self, after: float, deadlines: Deadlines) -> None:
        with one_cancellation():
            async with trio.open_nursery() as nursery:
                alarm = deadlines.add(partial(nursery.start_soon, self._hedge))
                deadlines.move(alarm, self._began + after)
                try:
                    await self._run(self.first)
                finally:
                    deadlines.discard(alarm)

    async def _hedge(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._winner is None and not self.first.is_over:
            self._second = self.find_second()
            if self._second is not None:
                await self._run(self._second)

    async def _run(self, runner: Runner[J]) -> None:
        try:
            with runner.scope:
                await runner.attempt(_RunnerSink(self, runner))
        except UpstreamFailure as failure:
            if not runner.record.outrun:
                runner.failure = failure
        except Exception as exc:
            self._crash = exc  # out of the nursery, which would wrap it in a group
            if (other := self._rival(runner)) is not None:
                other.call_off()
        finally:
            self._end(runner)

    def _end(self, runner: Runner[J]) -> None:
        runner.is_over = True
        verdict, failure, other = Verdict.NO_OPINION, runner.failure, self._rival(runner)
        if failure is not None and self._winner is None:
            verdict = failure.judgement.verdict
            if runner is self.first:
                self._note_if_late(trio.current_time())
            if other is not None:
                self.on_failure(runner, failure)
                self._let_lead(other)
        if runner is not self.leader:
            self.admission.leave(runner.ticket, verdict)

    def commit(self, runner: Runner[J]) -> bool:
        """*runner* has the first content; false if the other one had it before."""
        if self._winner is not None:
            return False
        self._winner, now = runner, trio.current_time()
        other = self._rival(runner)
        if runner is self.first:
            self.hedging.measured(now - self._began, now)
        elif other is not None:
            self._note_if_late(now)
        if other is not None:
            other.record.outrun = True
            other.call_off()
        self._let_lead(runner)
        self.record.adopt(runner.record)
        self.record.on_commit = runner.record.on_commit
        return True

    def _note_if_late(self, now: float) -> None:
        """The first attempt has come to nothing."""
        elapsed = now - self._began
        if self._after is not None and elapsed >= self._after:
            self.hedging.overtaken(now)
            self.first.upstream.endpoint.latency.at_least(elapsed, now)

    def _let_lead(self, runner: Runner[J]) -> None:
        if runner is self.leader:
            return
        self.ticket.swap(runner.ticket)
        self.leader.ticket, runner.ticket = runner.ticket, self.ticket
        self.leader = runner
        self.record.endpoint = runner.upstream.endpoint.url

    def _rival(self, runner: Runner[J]) -> Runner[J] | None:
        """The other one, if it is still running."""
        other = self._second if runner is self.first else self.first
        return None if other is None or other.is_over else other

    def _hang_up(self) -> None:
        for runner in (self.first, self._second):
            if runner is not None:
                runner.record.hang_up()


@attrs.define(eq=False)
class _RunnerSink(Generic[J]):
    """The sink of a race, for one of those who run in it."""

    race: Race[J]
    runner: Runner[J]

    @property
    def takes_at_once(self) -> bool:
        return self.race.sink.takes_at_once

    def write_now(self, data: bytes) -> bytes:
        return self.race.sink.write_now(data)

    async def write_rest(self, rest: bytes) -> None:
        await self.race.sink.write_rest(rest)

    async def start_early(self, data: bytes) -> None:
        await self.race.sink.start_early(data)

    async def start(self, data: bytes) -> None:
        race = self.race
        if not race.commit(self.runner):
            await trio.sleep_forever()  # the cancellation is on its way
        await race.sink.start(data)
        self.runner.record.committed = race.record.committed

    async def write(self, data: bytes) -> None:
        await self.race.sink.write(data)

    async def finish(self, data: bytes) -> None:
        await self.race.sink.finish(data)
