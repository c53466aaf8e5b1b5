"""Two attempts at one sink: one of them has it, whatever the moment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.app.hedging import Race, Runner
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.config.loader import parse
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.record import RequestRecord
from citadel_gateway.io.stream_relay import Sink
from citadel_gateway.policy.hedging import HedgeResult, Hedging
from citadel_gateway.policy.waitroom import Ticket, Waitroom
from tests.support.gateway import fleet

AFTER = 1.0
Attempt = Callable[[Sink], Awaitable[object]]


@attrs.define(eq=False)
class Client:
    """A sink that keeps what it is given."""

    got: list[bytes] = attrs.field(factory=list)
    takes_at_once: bool = True

    def write_now(self, data: bytes) -> bytes:
        self.got.append(data)
        return b""

    async def write(self, data: bytes) -> None:
        self.got.append(data)
        await trio.lowlevel.checkpoint()

    write_rest = start_early = start = finish = write


@attrs.define(eq=False)
class Track:
    """What is around a race."""

    client: Client = attrs.field(factory=Client)
    waitroom: Waitroom = attrs.field(factory=lambda: Waitroom(9, 9))
    record: RequestRecord = attrs.field(factory=lambda: RequestRecord("r", "/", "c", 0.0))
    hung_up: list[str] = attrs.field(factory=list)

    def race(self, first: Attempt, second: Attempt) -> Race[str]:
        a, b = LoadBalancer(parse(fleet({"m": ["a", "b"]}), source="test")).upstreams
        runner = self.runner("first", a, first)
        return Race(
            sink=self.client,
            record=self.record,
            ticket=runner.ticket,
            admission=Admission(self.waitroom, lambda *_: None),
            hedging=Hedging(),
            first=runner,
            find_second=partial(self.runner, "second", b, second),
            on_failure=lambda *_: None,
        )

    def runner(self, name: str, upstream: Upstream, attempt: Attempt) -> Runner[str]:
        ticket = Ticket("m", "m", lambda _: upstream.endpoint)
        self.waitroom.enter(ticket, 0.0)
        record = self.record.for_attempt(0.0)
        record.hang_up = partial(self.hung_up.append, name)
        return Runner(
            upstream=upstream, ticket=ticket, record=record, journey=name, attempt=attempt
        )


async def run(race: Race[str]) -> None:
    deadlines = Deadlines()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        await race.run(AFTER, deadlines)
        nursery.cancel_scope.cancel()


async def test_of_two_that_speak_in_the_same_moment_one_is_heard(
    autojump_clock: MockClock,
) -> None:
    """Neither waits for anything between its first word and its last."""
    go = trio.Event()

    async def speak(word: bytes, sink: Sink) -> None:
        await go.wait()
        await sink.start(word)
        sink.write_now(word)

    for _ in range(10):
        track = Track()
        race = track.race(partial(speak, b"1"), partial(speak, b"2"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, race)
            await trio.sleep(2 * AFTER)
            go.set()
        go = trio.Event()

        assert track.client.got in ([b"1", b"1"], [b"2", b"2"])
        assert race.result in {HedgeResult.WON, HedgeResult.LOST}
        assert track.waitroom.taken == 1


async def test_both_are_hung_up_on_when_the_client_leaves(autojump_clock: MockClock) -> None:
    async def hang(_: Sink) -> None:
        await trio.sleep_forever()

    track = Track()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, track.race(hang, hang))
        await trio.sleep(2 * AFTER)
        track.record.pass_on_leave()
        nursery.cancel_scope.cancel()

    assert track.hung_up == ["first", "second"]
    assert track.waitroom.taken == 1  # the request's own, which its owner gives back


@pytest.mark.parametrize("which", ["first", "second"])
async def test_what_should_not_have_been_ends_both(autojump_clock: MockClock, which: str) -> None:
    async def crash(_: Sink) -> None:
        await trio.sleep(AFTER)
        raise ZeroDivisionError

    async def hang(_: Sink) -> None:
        await trio.sleep_forever()

    track = Track()
    race = track.race(crash, hang) if which == "first" else track.race(hang, crash)
    caught: list[Exception] = []

    async def run_and_catch() -> None:
        try:
            await race.run(AFTER / 2, deadlines)
        except ZeroDivisionError as exc:
            caught.append(exc)

    deadlines = Deadlines()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        nursery.start_soon(run_and_catch)
        await trio.sleep(3 * AFTER)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert len(caught) == 1
    assert track.waitroom.taken == 1


async def test_whoever_is_cancelled_with_it_sees_one_cancellation(
    autojump_clock: MockClock,
) -> None:
    async def hang(_: Sink) -> None:
        await trio.sleep_forever()

    seen: list[BaseException] = []

    async def run_and_look() -> None:
        try:
            await race.run(AFTER, deadlines)
        except BaseException as exc:
            seen.append(exc)
            raise

    race, deadlines = Track().race(hang, hang), Deadlines()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        nursery.start_soon(run_and_look)
        await trio.sleep(2 * AFTER)
        nursery.cancel_scope.cancel()

    assert [type(exc) for exc in seen] == [trio.Cancelled]
