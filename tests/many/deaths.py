"""Workers that are killed, one after the other, while all are used as much as may be."""

from __future__ import annotations

import os
import random
import signal
import statistics
from collections import Counter
from contextlib import suppress
from pathlib import Path

import attrs
import trio
from bench.processes import resident_mb, tree

from tests.many.fleet import owners, workers_of
from tests.many.report import Finding
from tests.support.counters import CounterWatch
from tests.support.ledger import total
from tests.support.raw_client import NoResponseError, RawClient, http_request
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
from tests.support.several import ASK, CHAT, GatewayProcess, configuration, engines, gateways

_CAP = 16
_LEASE = 3.0  # the default
_MOST_KEPT = 50  # requests on a connection
_SCRAPES = 0.1
_OK = "citadel_gateway_requests_total"


def _answer(entry: LedgerEntry) -> Script:
    script = whole_chat("ok")
    if entry.json.get("stream"):
        script = stream_chat([f"w{n} " for n in range(8)])
    # Its work is done before its answer can be read, and the next request be sent.
    return Script([sleep(0.05), answered(), *script.steps])


@attrs.define(eq=False)
class Clients:
    """What they got, and on whose connection.

    :param doomed: our ends of connections with workers that were killed.
    """

    port: int
    answered: int = 0
    own: int = 0
    others: Counter[str] = attrs.field(factory=Counter)
    doomed: set[int] = attrs.field(factory=set)
    connected: set[int] = attrs.field(factory=set)
    stopping: bool = False

    async def run(self, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self._keep_asking, number % 3 == 0)

    async def _keep_asking(self, stream: bool) -> None:
        while not self.stopping:
            port = 0
            try:
                async with await RawClient.connect(self.port) as client:
                    port = client.stream.socket.getsockname()[1]  # type: ignore[attr-defined]
                    self.doomed.discard(port)  # the one who had it is long gone
                    self.connected.add(port)
                    await self._ask_often(client, stream)
            except (OSError, NoResponseError, trio.BrokenResourceError) as exc:
                self._failed(port, repr(exc))
            finally:
                self.connected.discard(port)

    async def _ask_often(self, client: RawClient, stream: bool) -> None:
        for _ in range(_MOST_KEPT):
            if self.stopping:
                return
            await client.send(http_request("POST", CHAT, {**ASK, "stream": stream}))
            response = await client.read_response("POST")
            whole = response.complete and (not stream or response.body.endswith(b"[DONE]\n\n"))
            if response.status != 200 or not whole:
                raise NoResponseError(f"{response.status} {response.body[:100]!r}")
            self.answered += 1
            if response.header("connection") == "close":
                return

    def _failed(self, port: int, why: str) -> None:
        if port in self.doomed:
            self.own += 1
        else:
            self.others[why] += 1


@attrs.define(eq=False)
class Growth:
    """What there is of a gateway: memory in MB, descriptors of the supervisor, its files."""

    folder: Path
    memory: list[float] = attrs.field(factory=list)
    descriptors: list[int] = attrs.field(factory=list)
    sizes: list[dict[str, int]] = attrs.field(factory=list)
    supervisor: list[float] = attrs.field(factory=list)

    def look(self, pid: int) -> None:
        whole = resident_mb(pid)
        self.memory.append(whole)
        self.supervisor.append(whole - sum(resident_mb(child) for child in tree(pid)[1:]))
        self.descriptors.append(len([*Path(f"/proc/{pid}/fd").iterdir()]))
        files = (file for file in self.folder.rglob("*") if file.is_file())
        self.sizes.append({str(f.relative_to(self.folder)): f.stat().st_blocks for f in files})


async def one_after_the_other(
    folder: Path, redis: RedisServer, *, seconds: float, pause: float, clients: int
) -> list[Finding]:
    """Four workers; every *pause* seconds one of them is killed."""
    rng = random.Random(5)
    back: list[float] = []
    kills = 0
    peak = 0
    watch, growth = CounterWatch(), Growth(folder / "store")
    async with engines(2) as (fleet, ports):

        def watched(entry: LedgerEntry) -> Script:
            nonlocal peak
            peak = max(peak, _working(fleet))
            return _answer(entry)

        for engine in fleet:
            engine.default = watched
        config = configuration(
            ports,
            {},
            service={"workers": 4},
            performance={"max_concurrent_requests": _CAP},
            load_balancer={"queue_size": 400, "queue_timeout": 30},
        )
        config["models"][MODEL]["max_concurrent"] = _CAP
        config["store"] = {"path": str(folder / "store")}
        async with gateways(folder, 1, config) as [gateway], trio.open_nursery() as nursery:
            crowd = Clients(gateway.port)
            scraping = trio.CancelScope()
            nursery.start_soon(crowd.run, clients)
            nursery.start_soon(_scrape, gateway, watch, scraping)
            await trio.sleep(2.0)
            until = trio.current_time() + seconds
            while trio.current_time() < until:
                await _until_ready(gateway, 4)
                growth.look(gateway.process.pid)
                victim = rng.choice(workers_of([gateway]))
                os.kill(victim, signal.SIGSTOP)  # it takes nobody any more, so we know whose it has
                crowd.doomed |= owners(crowd.connected, [victim], of_peer=True).keys()
                os.kill(victim, signal.SIGKILL)
                killed = trio.current_time()
                kills += 1
                with trio.move_on_after(10.0):
                    await trio.sleep(0.05)  # the engine notices
                    while _working(fleet) < _CAP:  # noqa: ASYNC110  # others tell of it
                        await trio.sleep(0.002)
                back.append(trio.current_time() - killed)
                await trio.sleep(pause * rng.uniform(0.5, 1.5))
            await _until_ready(gateway, 4)
            growth.look(gateway.process.pid)
            crowd.stopping = True
            while crowd.connected:  # noqa: ASYNC110  # they come to their end
                await trio.sleep(0.05)
            scraping.cancel()
            page = await gateway.metrics()
            deaths = sum(line.get("event") == "a worker died" for line in gateway.log.lines)
            nursery.cancel_scope.cancel()
    counted = total(page, _OK, outcome="ok")
    scene = f"4 workers, {kills} times kill -9 under load"
    lost = crowd.answered - counted
    others = sum(crowd.others.values())
    first, last = growth.sizes[0], growth.sizes[-1]
    return [
        Finding(
            scene,
            "only its own connections are cut",
            f"{crowd.answered} answers, {crowd.own} cut with their worker, {others} others"
            + "".join(f"; {n} x {why}" for why, n in crowd.others.most_common(3)),
            crowd.own > 0 and not others,
        ),
        Finding(
            scene,
            f"{_CAP} at once at the most; what it held is back within its lease ({_LEASE:g} s)",
            f"{peak}; all {_CAP} in use again after {statistics.median(back):.2f} s, "
            f"{max(back):.2f} s at the most",
            peak <= _CAP and max(back) <= _LEASE + 0.5,
        ),
        Finding(
            scene,
            "no counter falls",
            f"{len(watch.fallen)} in {watch.pages} scrapes"
            + "".join(f"; {what}" for what in watch.fallen[:2]),
            watch.pages > seconds and not watch.fallen,
        ),
        Finding(
            scene,
            "counted is what was answered, but for a dead worker's last second",
            f"{counted:.0f} counted, {lost:.0f} less than answered ({lost / kills:.1f} a death)",
            -crowd.own <= lost <= kills * crowd.answered / (seconds + 2) / 2,
        ),
        Finding(
            scene,
            "each is replaced",
            f"{deaths} deaths seen, {total(page, 'citadel_gateway_workers_ready'):.0f} ready",
            deaths == kills == total(page, "citadel_gateway_worker_deaths_total"),
        ),
        Finding(
            scene,
            "nothing grows for ever",
            f"supervisor {growth.supervisor[0]:.0f} -> {growth.supervisor[-1]:.0f} MB, "
            f"all {growth.memory[0]:.0f} -> {growth.memory[-1]:.0f} MB, "
            f"descriptors {growth.descriptors[0]} -> {growth.descriptors[-1]}, files "
            f"{len(first)} -> {len(last)}, "
            f"{sum(first.values()) // 2} -> {sum(last.values()) // 2} KiB",
            growth.descriptors[-1] <= growth.descriptors[0] + 2
            and first.keys() == last.keys()
            and sum(last.values()) <= 2 * sum(first.values()) + 128
            and growth.supervisor[-1] <= growth.supervisor[0] * 1.2,
        ),
    ]


def _working(fleet: list[ScriptedEngine]) -> int:
    return sum(engine.in_flight for engine in fleet)


async def _scrape(gateway: GatewayProcess, watch: CounterWatch, scope: trio.CancelScope) -> None:
    with scope:
        while True:
            with suppress(OSError, NoResponseError, trio.BrokenResourceError, ValueError):
                watch.take(await gateway.metrics())  # unless it asked the one that is killed
            await trio.sleep(_SCRAPES)


async def _until_ready(gateway: GatewayProcess, workers: int) -> None:
    with trio.move_on_after(60.0):
        while (await gateway.request("GET", "/health")).json()["workers"]["ready"] != workers:  # noqa: ASYNC110
            await trio.sleep(0.1)
