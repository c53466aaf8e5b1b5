"""Everything at once, for as long as you like: mixed load, while a seeded hand breaks things.

A *turn* is a time of faults, a time to heal, and a calm one, in which limits are looked at closely.
In the second half no worker dies, so that what they gather can be seen.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio
from bench.processes import free_ports, resident_mb

from tests.many.callers import QUICK, Callers, Kind, accounts, words
from tests.many.fleet import Shape, api_key, workers_of
from tests.many.hand import KEY, Hand, Host, plan
from tests.many.ledger import Told, excess, fill
from tests.many.report import Finding
from tests.support.counters import CounterWatch
from tests.support.ledger import total
from tests.support.raw_client import NoResponseError
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import (
    MODEL,
    LedgerEntry,
    Script,
    ScriptedEngine,
    answered,
    sleep,
    stream_chat,
    whole_chat,
)
from tests.support.several import GatewayProcess, configuration, gateways

STEADY_RATE, STEADY_BURST = 20, 10
WAVE_RATE, WAVE_BURST = 20, 60
BUCKETS = [("steady", STEADY_RATE, STEADY_BURST), ("waves", WAVE_RATE, WAVE_BURST)]
_WAVE = 1.5  # seconds
CAP = 4  # of each of two endpoints
_WORD = 0.05  # seconds that one takes
_FAULTS = 20.0  # seconds of a turn
_CALMS, _CALM = 3, 2.0  # so many times so many seconds, and then a wave
_HEALS = 20.0
_LEAVES = 1.0  # seconds in which an engine has to hear of a departure
_SETTLES = 0.5  # seconds in which all tell a store that was emptied what they have spent
_LEASE = 3.0  # the default
LEAST = 0.97
PATIENCE = 0.02  # the default

KINDS = [
    Kind(name="steady", count=4, pause=0.12, key="steady", model=QUICK),
    Kind(name="whole", count=5, pause=0.3),
    Kind(name="bulk", count=2, pause=0.3, priority="bulk"),
    Kind(name="stream", count=2, pause=0.1, stream=True, words=15),
    Kind(name="same-again", count=2, pause=0.1, stream=True, words=15, temperature=0.0),
    Kind(name="leaver", count=2, pause=0.5, stream=True, words=100, reads=4),
]
WAVE = Kind(name="wave", count=8, pause=0.03, key="waves", model=QUICK)
HOLDER = Kind(name="holder", count=4 * CAP, pause=0.0, words=20)


@attrs.define(eq=False)
class Counted:
    """Engines' own count of what each has at once.

    What a client has left is not counted: on its way are, by another connection, the news of that
    and the next request.

    :param exceeded: when one had more than its cap, in words.
    """

    callers: Callers
    peak: int = 0
    exceeded: list[str] = attrs.field(factory=list)
    running: dict[int, list[LedgerEntry]] = attrs.field(factory=dict)

    def note(self, engine: int, entry: LedgerEntry) -> None:
        now = [e for e in self.running.get(engine, []) if not e.over] + [entry]
        self.running[engine] = now
        count = self.of(engine)
        self.peak = max(self.peak, count)
        if count > CAP:
            self.exceeded.append(f"{count} at {trio.current_time() % 1e5:.2f}")

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
            await self.callers.run([WAVE], _WAVE)
        over = trio.current_time()
        missing = await self.hand.until_whole(_HEALS)
        self.healed.append(trio.current_time() - over)
        self.slow += [f"turn {turn}: {what}" for what in missing]
        await self._be_calm()
        self.turns.append((began, trio.current_time()))
        self.looks.append([Look.at_one(gateway) for gateway in self.hand.several])

    async def _be_calm(self) -> None:
        """While it is, the bucket of the waves gets full."""
        for _ in range(_CALMS):
            await self._note_calm([], _CALM)
        await self._note_calm([WAVE], _WAVE)

    async def _note_calm(self, kinds: list[Kind], seconds: float) -> None:
        before, began = await self._misses(), trio.current_time()
        await self.callers.run(kinds, seconds)
        await trio.sleep_until(began + seconds)
        ended = trio.current_time()
        self.calms.append(Calm(bool(kinds), began, ended, await self._misses() - before))

    async def _misses(self) -> float:
        pages = [await gateway.metrics(KEY) for gateway in self.hand.several]
        return sum(total(page, "citadel_gateway_store_misses_total") for page in pages)


async def run(
    folder: Path,
    redis: RedisServer,
    shape: Shape,
    seconds: float,
    seed: int | None = None,
    patience: float = PATIENCE,
    least: float = LEAST,
) -> list[Finding]:
    """*seconds* of the faults and what is between them; the beginning and the end are besides.

    :param seed: of the faults; else a new one, which is told.
    :param patience: with the store, where little is promised of the machine.
    :param least: part of each bucket that has to be let through while nothing is disturbed.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    sys.stderr.write(f"soak of {shape}, --seed {seed}\n")
    ports = free_ports(3, first=24000)
    hosts = [Host(ScriptedEngine(), port) for port in ports]
    config, other = _configurations(shape, redis, folder, ports, patience)
    async with trio.open_nursery() as nursery:
        for host in hosts:
            await nursery.start(host.serve)
        async with gateways(folder, shape.gateways, config) as several:
            callers = Callers(several)
            counted = Counted(callers)
            _teach(hosts, counted)
            hand = Hand(
                shape, redis, several, hosts[:2], callers, nursery, (json.dumps(config), other),
                folder / "gateway.json",
            )  # fmt: skip
            watches = [CounterWatch() for _ in several]
            soak = Soak(shape, seed, hand, callers, counted, watches)
            soak.slow += await hand.until_whole(_HEALS)
            async with trio.open_nursery() as scraping:
                for gateway, watch in zip(several, watches, strict=True):
                    scraping.start_soon(_scrape, gateway, watch)
                await _all_turns(soak, seconds)
                scraping.cancel_scope.cancel(reason="it is over")
            seats = await _seats(soak, hosts)
            full = await _fill_all(soak)
            findings = await _judge(soak, hosts, seats, full, least)
        nursery.cancel_scope.cancel(reason="it is over")
    return findings


async def _all_turns(soak: Soak, seconds: float) -> None:
    async with trio.open_nursery() as load:
        load.start_soon(soak.callers.run, KINDS)
        began = trio.current_time()
        while (left := began + seconds - trio.current_time()) > 0:
            faults = min(_FAULTS, max(left - _CALMS * _CALM - _WAVE, 1.0))
            deaths = left > seconds / 2
            await soak.take_turn(len(soak.turns), faults, deaths=deaths)
        soak.callers.stopping = True


def _configurations(
    shape: Shape, redis: RedisServer, folder: Path, ports: list[int], patience: float
) -> tuple[dict[str, Any], str]:
    """Two that differ in what changes no promise."""
    limits = {"rate_limiting_enabled": True, "rate_limit_rps": 10_000}
    keys = [
        api_key(KEY, weight=2),
        api_key("steady", rate_limit_rps=STEADY_RATE, rate_limit_burst=STEADY_BURST),
        api_key("waves", rate_limit_rps=WAVE_RATE, rate_limit_burst=WAVE_BURST),
    ]
    balancing: dict[str, Any] = {
        "queue_size": 400, "queue_timeout": 30, "health_check_interval": 0.5,
        "circuit_breaker_timeout": 1.0,
    }  # fmt: skip
    config = configuration(
        ports[:2],
        {},
        service={"workers": shape.workers},
        performance={**limits, "max_concurrent_requests": 200},
        security={"api_keys": keys},
        load_balancer=balancing,
    )
    config["models"][MODEL]["max_concurrent"] = CAP
    config["models"][QUICK] = {"endpoint": f"http://127.0.0.1:{ports[2]}", "max_concurrent": 100}
    config["store"] = {**shape.store(redis.url, folder / "store"), "timeout": patience}
    other = {**config, "load_balancer": {**config["load_balancer"], "algorithm": "least_latency"}}
    other["models"] = {**config["models"], MODEL: {**config["models"][MODEL], "aliases": ["alias"]}}
    return config, json.dumps(other)


def _teach(hosts: list[Host], counted: Counted) -> None:
    def default(number: int) -> Any:
        def answer(entry: LedgerEntry) -> Script:
            counted.note(number, entry)
            return _answer(entry)

        return answer

    for number, host in enumerate(hosts):
        host.engine.default = default(number)
    # Who answers at once has no more of it than the connections that there are.
    hosts[2].engine.default = Script([answered(), *whole_chat("ok").steps])


def _answer(entry: LedgerEntry) -> Script:
    """Its work is done before its end can be read, and the next request be sent."""
    asked = entry.json
    if not asked["stream"]:
        return Script([sleep(asked["max_tokens"] * _WORD), answered(), *whole_chat("ok").steps])
    steps = stream_chat(words(asked["max_tokens"]), gap=_WORD).steps
    return Script([sleep(_WORD), *steps[:-3], answered(), *steps[-3:]])


async def _scrape(gateway: GatewayProcess, watch: CounterWatch) -> None:
    while True:
        with suppress(OSError, NoResponseError, trio.BrokenResourceError, ValueError):
            watch.take(await gateway.metrics(KEY))  # unless it asked the one that is killed
        await trio.sleep(1.0)


async def _seats(soak: Soak, hosts: list[Host]) -> list[str]:
    """What is still taken when all clients have left."""
    taken = ["all"]
    with trio.move_on_after(_LEASE + 1.0):
        while taken:
            found = [f"{h.engine.in_flight} at {h.port}" for h in hosts if h.engine.in_flight]
            for gateway in soak.hand.several:
                status = (await gateway.request("GET", "/models/status", key=KEY)).json()
                if (count := status["limits"]["in_flight"]) or status["waiting_for_any_model"]:
                    found.append(f"{count} seats")
                for name, model in status["models"].items():
                    there = sum(endpoint["in_flight"] for endpoint in model["endpoints"])
                    if there or model["waiting"]:
                        found.append(f"{name}: {there} at engines, {model['waiting']} wait")
            taken = found
            await trio.sleep(0.1)
    return taken


async def _fill_all(soak: Soak) -> float:
    """Seconds until all of both caps is in use again by who comes then; infinity for never."""
    soak.callers.stopping = False
    began = trio.current_time()
    took = float("inf")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(soak.callers.run, [HOLDER], _LEASE + 1.0)
        with trio.move_on_after(_LEASE + 1.0):
            while min(soak.counted.of(0), soak.counted.of(1)) < CAP:  # noqa: ASYNC110
                await trio.sleep(0.005)
            took = trio.current_time() - began
        soak.callers.stopping = True
    return took


async def _judge(
    soak: Soak, hosts: list[Host], seats: list[str], full: float, least: float
) -> list[Finding]:
    hand = soak.hand
    scene = f"{soak.shape}: soak, seed {soak.seed}, {len(hand.done)} faults"
    pages = [await gateway.metrics(KEY) for gateway in hand.several]
    return [
        *_of_clients(scene, soak, hosts),
        *_of_limits(scene, soak, least),
        Finding(
            scene,
            f"{CAP} at once at each endpoint at the most",
            f"{soak.counted.peak}" + _some(soak.counted.exceeded),
            not soak.counted.exceeded,
        ),
        _of_counters(scene, soak, pages),
        Finding(
            scene,
            f"all is whole again within {_HEALS:g} s, workers that start included",
            f"{max(soak.healed):.1f} s at the most" + _some(soak.slow),
            not soak.slow,
        ),
        Finding(
            scene,
            f"no seat is left, and all of the caps can be used within {_LEASE:g} s",
            f"after {full:.2f} s" + _some(seats),
            not seats and full <= _LEASE,
        ),
        *_of_growth(scene, soak),
    ]


def _of_clients(scene: str, soak: Soak, hosts: list[Host]) -> list[Finding]:
    callers = soak.callers
    runs = [run for host in hosts for run in host.engine.posts]
    wrong, latest = accounts(callers.requests.values(), runs, _LEAVES)
    told = ", ".join(f"{n} {what}" for what, n in sorted(callers.outcomes().items()))
    left = callers.outcomes()["left"]
    return [
        Finding(
            scene,
            "each request has one end; cut are only those of a killed worker, and streams fail "
            "only with a killed engine",
            told + _some(wrong),
            not wrong,
        ),
        Finding(
            scene,
            f"no engine works for {_LEAVES:g} s for a client who has left",
            f"{left} left, heard of after {latest * 1e3:.0f} ms at the most",
            left > 0 and latest <= _LEAVES,
        ),
    ]


def _of_limits(scene: str, soak: Soak, least: float) -> list[Finding]:
    others = (soak.shape.processes - 1) / soak.shape.processes
    quiet, whole = [], []
    for key, rate, burst in BUCKETS:
        passed = soak.callers.of(key)
        for began, ended in soak.turns:
            silent = [s for s in soak.hand.silent if began <= s[0] < ended]
            # Some may be cut off while others are not.
            more = sum(others * (burst + rate * (s[1] - s[0])) for s in silent)
            over = excess(_within(passed, began, ended), rate, burst)
            whole.append((over - more, over, more))
            starts = [began, *(s[1] + _SETTLES for s in silent)]
            ends = [*(s[0] for s in silent), ended]
            quiet += [
                (excess(_within(passed, start, end), rate, burst), key, start, end)
                for start, end in zip(starts, ends, strict=True)
            ]
    over, key, start, end = max(quiet)
    # Where the store was too slow for a request, that is charged here and there.
    good = [calm for calm in soak.calms if not calm.misses]
    # The one bucket is empty when we begin to look, and the other one full.
    steady = [
        fill(_within(soak.callers.of("steady"), calm.began, calm.ended), STEADY_RATE, 0)
        for calm in good
        if not calm.is_wave
    ]
    waves = [
        fill(_within(soak.callers.of("waves"), calm.began, calm.ended), WAVE_RATE, WAVE_BURST)
        for calm in good
        if calm.is_wave
    ]
    return [
        Finding(
            scene,
            "at most 1 above each key's bucket while the store is there, else each gateway's part "
            "of it besides",
            f"{over:+.1f} ({key}, {start % 1e5:.2f} to {end % 1e5:.2f}); with "
            f"{len(soak.hand.silent)} outages {max(whole)[1]:+.1f} of {max(whole)[2]:.1f}",
            over <= 1 and max(whole)[0] <= 1,
        ),
        Finding(
            scene,
            f"at least {least:.0%} of it where nothing is disturbed",
            f"{_lowest(steady)}; of waves {_lowest(waves)}; "
            f"{sum(calm.misses for calm in soak.calms):.0f} decided without the store",
            min([*steady, *waves], default=1.0) >= least,
        ),
    ]


def _of_counters(scene: str, soak: Soak, pages: list[Any]) -> Finding:
    fallen = [what for watch in soak.watches for what in watch.fallen]
    counted = sum(total(page, "citadel_gateway_requests_total", outcome="ok") for page in pages)
    crashes = sum(total(page, "citadel_gateway_crashes_total") for page in pages)
    outcomes = soak.callers.outcomes()
    lost = outcomes["answered"] - counted
    span = sum(ended - began for began, ended in soak.turns)
    most = soak.hand.kills * outcomes["answered"] / span  # of a second
    odd = Counter(
        str(line.get("event"))
        for gateway in soak.hand.several
        for line in gateway.log.lines
        if line.get("level") == "error" or line.get("event") == "not a log line"
    )
    deaths = odd.pop("a worker died", 0)
    return Finding(
        scene,
        "no counter falls, all that is answered is counted but for a dead worker's last second, "
        "and nothing crashes",
        f"{len(fallen)} of {sum(w.pages for w in soak.watches)} pages; {lost:.0f} less after "
        f"{deaths} deaths; {crashes:.0f} crashes" + _some(fallen) + _some(map(str, odd.items())),
        not fallen
        and not crashes
        and not odd
        and deaths == soak.hand.kills
        and -outcomes["cut"] - outcomes["left"] <= lost <= most,
    )


def _of_growth(scene: str, soak: Soak) -> list[Finding]:
    """From the second minute on; of workers, those who have lived since."""
    began = soak.looks[0][0].at
    told, kept = [], True
    for number in range(soak.shape.gateways):
        looks = [turn[number] for turn in soak.looks if turn[number].at - began >= 60.0]
        if len(looks) < 3:
            return []
        first, last = looks[0], looks[-1]
        firsts = {pid: next(lk for lk in looks if pid in lk.workers) for pid in last.workers}
        grown = max(last.workers[pid] - look.workers[pid] for pid, look in firsts.items())
        age = min(last.at - look.at for look in firsts.values())
        told.append(
            f"supervisor {first.supervisor:.0f} -> {last.supervisor:.0f} MB, workers "
            f"{max(last.workers.values()):.0f} MB and at most {grown:+.1f} in {age:.0f} s, "
            f"descriptors {first.descriptors} -> {last.descriptors}"
        )
        kept &= last.supervisor <= first.supervisor * 1.1 + 2
        kept &= grown <= 8.0 and last.descriptors <= 1.2 * first.descriptors + 8
    return [Finding(scene, "nothing grows for ever", "; ".join(told), kept)]


def _within(told: list[Told], start: float, end: float) -> list[Told]:
    return [each for each in told if start <= each.began and each.ended <= end]


def _some(what: Any) -> str:
    every = [*what]
    return "".join(f"; {each}" for each in every[:5]) + (f"; {len(every)}" if every[5:] else "")


def _lowest(fills: list[float]) -> str:
    return f"{min(fills):.1%} and more in {len(fills)} windows" if fills else "no window"
