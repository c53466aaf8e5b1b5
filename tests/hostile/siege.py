"""One gateway under siege: hostile lanes, healthy clients, and what must hold between phases."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from tests.hostile.engines import Lane
from tests.hostile.healthy import Healthy
from tests.hostile.process import GatewayProcess, Levels, gateway_process
from tests.hostile.report import Report
from tests.hostile.wire import CHAT, chat_body, post
from tests.support.raw_client import NoResponseError, RawClient

LANES = 12
SETTLES_WITHIN = 5.0
_SANE_P99 = 2.0  # seconds, for a healthy client on a busy machine
_MOST_GROWTH_MB = 200


@attrs.define(eq=False)
class Siege:
    gateway: GatewayProcess
    lanes: list[Lane]
    stray: Lane  # whoever asks for no model is sent there
    healthy: Healthy
    report: Report
    seed: int
    baseline: Levels | None = None
    _resident: int = 0

    @property
    def port(self) -> int:
        return self.gateway.port

    def rng(self, *names: object) -> random.Random:
        """The same for the same seed and names, whatever has been drawn elsewhere."""
        return random.Random(":".join(map(str, (self.seed, *names))))

    async def phase(self, name: str, run: Callable[[Siege], Awaitable[None]]) -> None:
        self.report.phase = name
        self.report.note(f"{name}: begins")
        await run(self)
        await self.check(name)

    async def each(
        self, cases: Iterable[Any], play: Callable[[Siege, Lane, Any], Awaitable[None]]
    ) -> None:
        """Every case, on whichever lane is free: one at a time on each."""
        waiting = iter(cases)

        async def work(lane: Lane) -> None:
            for case in waiting:
                await play(self, lane, case)

        async with trio.open_nursery() as nursery:
            for lane in self.lanes:
                nursery.start_soon(work, lane)

    async def check(self, name: str) -> None:
        """What must hold once a phase is over, whatever it was."""
        report, gateway = self.report, self.gateway
        if (code := gateway.process.poll()) is not None:
            report.found("process", f"the gateway has exited with {code}")
            raise GatewayDiedError(code)
        await self.healthy.rest()
        await self._check_plain_request()
        await self._check_levels()
        for lane in [*self.lanes, self.stray]:
            for offence in lane.offences:
                report.found("engine", offence)
            lane.offences.clear()
            if lane.engine.in_flight:
                report.found("engine", f"{lane.model} still works on {lane.engine.in_flight}")
            lane.forget()
        await trio.sleep(0.15)  # the log is written every 100 ms
        for complaint in gateway.complaints:
            report.found("log", complaint)
        gateway.complaints.clear()
        grown = gateway.resident_mb() - self._resident
        if self._resident and grown > _MOST_GROWTH_MB:
            report.found("memory", f"grew by {grown} MB")
        if (p99 := self.healthy.worst(name)) > _SANE_P99:
            report.found("latency", f"healthy clients' p99 was {p99:.3f} s")
        report.note(
            f"{name}: ended; {self.healthy.quantiles(name)}; {gateway.resident_mb()} MB resident"
        )
        self.healthy.resume()

    async def settle(self) -> None:
        """Take the baseline, after everything has been used once."""
        self._resident = self.gateway.resident_mb()
        await self.healthy.rest()
        await trio.sleep(0.2)
        self.baseline = await self.gateway.levels()
        self.report.note(f"baseline: {self.baseline}")
        self.healthy.resume()

    async def _check_plain_request(self) -> None:
        lane = self.lanes[0]
        began = trio.current_time()
        answer: object = "nothing"
        with trio.move_on_after(10):
            try:
                async with await RawClient.connect(self.port) as client:
                    await client.send(bytes(post(chat_body(lane.model, "plain"), CHAT)))
                    answer = (await client.read_response("POST")).status
            except (OSError, NoResponseError, trio.BrokenResourceError) as exc:
                answer = exc
        took = trio.current_time() - began
        if answer != 200 or took > 1:
            self.report.found("plain request", f"{answer!r} after {took:.2f} s")

    async def _check_levels(self) -> None:
        """Back to the baseline within some seconds."""
        problem = "no answer from /metrics"
        with trio.move_on_after(SETTLES_WITHIN):
            while True:
                problem = self._compare(await self.gateway.levels())
                if not problem:
                    return
                await trio.sleep(0.1)
        self.report.found("levels", f"{problem} {SETTLES_WITHIN} s later")

    def _compare(self, levels: Levels) -> str:
        held = [
            f"{name} {value}"
            for name, value in attrs.asdict(levels).items()
            if name in {"client_connections", "in_flight", "queued"} and value
        ]
        base = self.baseline
        if base is not None and levels.descriptors > base.descriptors:
            held.append(f"descriptors {levels.descriptors}, were {base.descriptors}")
        if base is not None and base.tasks is not None and (levels.tasks or 0) > base.tasks:
            held.append(f"tasks {levels.tasks}, were {base.tasks}")
        return ", ".join(held)


class GatewayDiedError(Exception):
    pass


@asynccontextmanager
async def siege(
    *,
    seed: int,
    src: str | None = None,
    report: Report | None = None,
    lanes: int = LANES,
    **service: Any,
) -> AsyncIterator[Siege]:
    """A running gateway, its engines in this process, and healthy clients all the while."""
    report = report or Report(seed)
    attackers = [Lane(f"lane-{chr(97 + i) * 3}") for i in range(lanes)]  # no mutant of another
    stray, well = Lane("stray"), Lane("healthy")
    async with trio.open_nursery() as nursery:
        every = [stray, well, *attackers]
        for lane in every:
            await lane.start(nursery)
        with tempfile.TemporaryDirectory() as folder:
            models = {lane.model: lane.port for lane in every}
            async with gateway_process(Path(folder), models, src=src, **service) as gateway:
                healthy = Healthy(gateway.port, well.model, report)
                found = Siege(gateway, attackers, stray, healthy, report, seed)
                nursery.start_soon(healthy.run)
                nursery.start_soon(_forget, well)
                await found.each(range(2 * lanes), _warm)
                await found.settle()
                yield found
                nursery.cancel_scope.cancel(reason="the siege is over")


async def _warm(siege: Siege, lane: Lane, _: object) -> None:
    async with await RawClient.connect(siege.port) as client:
        await client.send(bytes(post(chat_body(lane.model, "warm"))))
        await client.read_response("POST")
    lane.forget()


async def _forget(lane: Lane) -> None:
    """The healthy clients check their answers themselves, so their engine's ledger may go."""
    while True:
        await trio.sleep(0.5)
        lane.forget()
