"""What a soak does in turns, and what it gathers to be judged by."""

from __future__ import annotations

from pathlib import Path

import attrs
import trio
from bench.processes import resident_mb

from tests.many.callers import QUICK, Callers, Kind
from tests.many.fleet import Shape, workers_of
from tests.many.hand import KEY, Hand, plan
from tests.support.counters import CounterWatch
from tests.support.ledger import total
from tests.support.scripted_engine import (
    LedgerEntry,
)
from tests.support.several import GatewayProcess

STEADY_RATE, STEADY_BURST = 20, 10
WAVE_RATE, WAVE_BURST = 20, 60
BUCKETS = [("steady", STEADY_RATE, STEADY_BURST), ("waves", WAVE_RATE, WAVE_BURST)]
WAVE_LASTS = 1.5  # seconds
CAP = 4  # of each of two endpoints
CALMS, CALM = 2, 2.0  # so many times so many seconds, and then a wave
HEALS = 20.0
WAVE = Kind(name="wave", count=8, pause=0.03, key="waves", model=QUICK)


@attrs.define(eq=False)
class Counted:
    """Engines' own count of what each has at once.

    What a client has left is not counted: on its way are, by another connection, the news of that
    and the next request.

    :param exceeded: when one had more than its cap, and how many.
    """

    callers: Callers
    peak: int = 0
    exceeded: list[tuple[float, int]] = attrs.field(factory=list)
    running: dict[int, list[LedgerEntry]] = attrs.field(factory=dict)

    def note(self, engine: int, entry: LedgerEntry) -> None:
        now = [e for e in self.running.get(engine, []) if not e.over] + [entry]
        self.running[engine] = now
        count = self.of(engine)
        self.peak = max(self.peak, count)
        if count > CAP:
            self.exceeded.append((trio.current_time(), count))

    def of(self, engine: int) -> int:
        gone = self.callers.gone
        return sum(not e.over and e.request_id not in gone for e in self.running.get(engine, []))


@attrs.frozen
class Look:
    """At one gateway: MB, and descriptors of all of its processes; workers by process number."""

    at: float
    supervisor: float
    workers: dict[int, float]
    descriptors: int

    @classmethod
    def at_one(cls, gateway: GatewayProcess) -> Look:
        pid, workers = gateway.process.pid, workers_of([gateway])
        each = {worker: resident_mb(worker) for worker in workers}
        open_ones = sum(len([*Path(f"/proc/{p}/fd").iterdir()]) for p in (pid, *workers))
        own = resident_mb(pid) - sum(each.values())
        return cls(trio.current_time(), own, each, open_ones)


@attrs.frozen
class Calm:
    """Some seconds in which nothing was disturbed.

    :param is_wave: whether the bucket of the waves was full, and used.
    :param misses: requests that were decided without the store all the same.
    """

    is_wave: bool
    began: float
    ended: float
    misses: float


@attrs.define(eq=False)
class Soak:
    """All that is gathered.

    :param slow: what had not healed in time, in words.
    """

    shape: Shape
    seed: int
    hand: Hand
    callers: Callers
    counted: Counted
    watches: list[CounterWatch]
    turns: list[tuple[float, float]] = attrs.field(factory=list)
    calms: list[Calm] = attrs.field(factory=list)
    looks: list[list[Look]] = attrs.field(factory=list)
    healed: list[float] = attrs.field(factory=list)
    slow: list[str] = attrs.field(factory=list)

    async def take_turn(self, turn: int, faults: float, *, deaths: bool) -> None:
        began = trio.current_time()
        redis = self.shape.gateways > 1
        todo = plan(self.seed, turn, faults, redis=redis, deaths=deaths)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hand.play, todo)
            await trio.sleep(faults / 2)
            await self.callers.run([WAVE], WAVE_LASTS)
        over = trio.current_time()
        missing = await self.hand.until_whole(HEALS)
        self.healed.append(trio.current_time() - over)
        self.slow += [f"turn {turn}: {what}" for what in missing]
        await self._be_calm()
        self.turns.append((began, trio.current_time()))
        self.looks.append([Look.at_one(gateway) for gateway in self.hand.several])

    async def _be_calm(self) -> None:
        """While it is, the bucket of the waves gets full."""
        for _ in range(CALMS):
            await self._note_calm([], CALM)
        await self._note_calm([WAVE], WAVE_LASTS)

    async def _note_calm(self, kinds: list[Kind], seconds: float) -> None:
        before, began = await self._misses(), trio.current_time()
        await self.callers.run(kinds, seconds)
        await trio.sleep_until(began + seconds)
        ended = trio.current_time()
        self.calms.append(Calm(bool(kinds), began, ended, await self._misses() - before))

    async def _misses(self) -> float:
        pages = [await gateway.metrics(KEY) for gateway in self.hand.several]
        return sum(total(page, "citadel_gateway_store_misses_total") for page in pages)
