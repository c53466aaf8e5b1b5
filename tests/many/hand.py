"""A hand that breaks one thing after the other, and does the same again for the same seed."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import attrs
import trio

from tests.many.callers import Callers
from tests.many.fleet import Shape, owners, workers_of
from tests.support.ledger import total
from tests.support.raw_client import NoResponseError
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import ScriptedEngine
from tests.support.several import GatewayProcess

What = Literal["kill", "roll", "reload", "pause", "restart", "empty", "engine"]
Part = Literal["workers", "engines"]
_WORKERS: Collection[Part] = frozenset[Part](["workers"])
_ENGINES: Collection[Part] = frozenset[Part](["engines"])
_ALL: Collection[Part] = ("workers", "engines")
KEY = "free"
_WEIGHTS: dict[What, int] = {
    "kill": 3, "roll": 1, "reload": 2, "pause": 3, "restart": 2, "empty": 2, "engine": 3,
}  # fmt: skip
_OF_REDIS: Sequence[What] = ("pause", "restart", "empty")
_ENDS_WORKERS: Sequence[What] = ("kill", "roll")
# More deaths of one worker in a minute would make its successors wait, and a roll takes its time.
_MOST: dict[What, int] = {"kill": 2, "roll": 1}
_ROLLED = "all workers have been replaced"
GIVEN_UP = "a worker cannot be replaced; it serves on"  # its successor was killed before it served


@attrs.frozen
class Fault:
    """One of them.

    :param after: seconds since the one before.
    :param lasts: seconds.
    :param which: of several, from 0 to 1.
    """

    what: What
    after: float
    lasts: float
    which: float

    def of(self, several: Sequence[int]) -> int:
        return several[int(self.which * len(several))]


def plan(seed: int, turn: int, seconds: float, *, redis: bool, deaths: bool) -> list[Fault]:
    """What happens in a *turn* of so many *seconds*.

    :param deaths: whether workers end, too.
    """
    rng = random.Random(f"{seed} {turn}")
    faults: list[Fault] = []
    at = 0.0
    while True:
        after = rng.uniform(1.0, 4.0)
        if (at := at + after) > seconds:
            return faults
        kinds = [
            what
            for what in _WEIGHTS
            if (redis or what not in _OF_REDIS)
            and (deaths or what not in _ENDS_WORKERS)
            and sum(fault.what == what for fault in faults) < _MOST.get(what, 100)
        ]
        [what] = rng.choices(kinds, [_WEIGHTS[kind] for kind in kinds])
        faults.append(Fault(what, after, rng.uniform(0.5, 3.0), rng.random()))


@attrs.define(eq=False)
class Host:
    """An engine that can be killed and started on the same port."""

    engine: ScriptedEngine
    port: int
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is killed."""
        with trio.CancelScope() as self._scope:
            listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
            task_status.started()
            await trio.serve_listeners(self.engine.serve, listeners)

    def kill(self) -> None:
        self._scope.cancel(reason="kill -9")


@attrs.define(eq=False)
class Hand:
    """For one fleet.

    :param nursery: where engines live that come back.
    :param configurations: what is in the *file* in turns.
    :param done: what was done, and when.
    :param dark: from when to when an engine was away.
    :param unsaid: of the *kills*, those that may have been of a worker that did not count.
    :param stuck: what had not healed when the store was to break, or long after, in words.
    :param silent: from when to when not all could ask the store, or it had forgotten everything.
    :param missed: the same, when a request was decided without it, as on a busy machine.
    """

    shape: Shape
    redis: RedisServer
    several: Sequence[GatewayProcess]
    hosts: Sequence[Host]
    callers: Callers
    nursery: trio.Nursery
    configurations: tuple[str, str]
    file: Path
    done: list[str] = attrs.field(factory=list)
    silent: list[tuple[float, float]] = attrs.field(factory=list)
    missed: list[tuple[float, float]] = attrs.field(factory=list)
    dark: list[tuple[float, float]] = attrs.field(factory=list)
    kills: int = 0
    unsaid: int = 0
    stuck: list[str] = attrs.field(factory=list)
    _rolls: dict[int, int] = attrs.field(factory=dict)
    _reloads: int = 0
    # Who starts while the store is gone knows of no others, and takes limits for his own.
    _births: trio.Lock = attrs.field(factory=trio.Lock)
    _engines: trio.Lock = attrs.field(factory=trio.Lock)

    async def play(self, faults: Sequence[Fault]) -> None:
        """One after the other; one that lasts may still do so when the next one comes."""
        async with trio.open_nursery() as nursery:
            for fault in faults:
                await trio.sleep(fault.after)
                match fault.what:
                    case "reload":
                        self._reload(fault)
                    case "engine":
                        nursery.start_soon(self._kill_an_engine, fault)
                    case "kill" | "roll":
                        async with self._births:
                            await self._end_workers(fault)
                    case _:
                        await nursery.start(self._break_the_store, fault)

    async def until_whole(self, within: float, of: Collection[Part] = _ALL) -> list[str]:
        """All workers serve and know of each other, and of all engines that they are well.

        Returns what is missing *of* that after so many seconds.
        """
        missing = ["all"]
        with trio.move_on_after(within):
            while missing:
                found = []
                for gateway in self.several:
                    try:
                        found += await self._missing_of(gateway, of)
                    except (OSError, NoResponseError, trio.BrokenResourceError) as exc:
                        found.append(repr(exc))  # it asked one that was killed
                missing = found
                await trio.sleep(0.1)
        return missing

    async def _missing_of(self, gateway: GatewayProcess, of: Collection[Part]) -> list[str]:
        missing = []
        if "workers" in of:
            missing += await self._missing_workers(gateway)
        if "engines" in of:
            status = (await gateway.request("GET", "/models/status", key=KEY)).json()
            missing += [
                f"{endpoint['url']} is {endpoint['breaker']}, healthy: {endpoint['healthy']}"
                for model in status["models"].values()
                for endpoint in model["endpoints"]
                if not endpoint["healthy"] or endpoint["breaker"] != "closed"
            ]
        return missing

    async def _missing_workers(self, gateway: GatewayProcess) -> list[str]:
        missing = []
        ready = (await gateway.request("GET", "/health", key=KEY)).json()["workers"]["ready"]
        running = len(workers_of([gateway]))
        if (ready, running) != (self.shape.workers, self.shape.workers):
            missing.append(f"{ready} of {running} workers are ready")
        if self._is_rolling(gateway):
            missing.append("workers are being replaced")
        page = await gateway.metrics(KEY)
        if not total(page, "citadel_gateway_store_up"):
            missing.append("one is alone")
        members = total(page, "citadel_gateway_store_members")
        if members != self.shape.processes:
            missing.append(f"{members:g} members")
        return missing

    def _is_rolling(self, gateway: GatewayProcess) -> bool:
        asked = self._rolls.get(gateway.process.pid, 0)
        return gateway.count(_ROLLED) + gateway.count(GIVEN_UP) < asked

    def _say(self, fault: Fault, what: str) -> None:
        line = f"{trio.current_time() % 1e5:9.2f} {fault.what}: {what}"
        self.done.append(line)
        sys.stderr.write(f"{line}\n")

    def _reload(self, fault: Fault) -> None:
        self._reloads += 1
        fresh = self.file.with_suffix(".new")
        fresh.write_text(self.configurations[self._reloads % 2])
        fresh.replace(self.file)
        gateway = self.several[int(fault.which * len(self.several))]
        gateway.process.send_signal(signal.SIGHUP)
        self._say(fault, "another configuration")

    async def _end_workers(self, fault: Fault) -> None:
        if fault.what == "roll":
            gateway = self.several[int(fault.which * len(self.several))]
            pid = gateway.process.pid
            self._rolls[pid] = self._rolls.get(pid, 0) + 1
            gateway.process.send_signal(signal.SIGUSR2)
            self._say(fault, f"of {pid}")
            return
        victim = fault.of(workers_of(self.several))
        os.kill(victim, signal.SIGSTOP)  # it takes nobody any more, so we know whose it has
        self.callers.doomed |= owners(self.callers.connected, [victim], of_peer=True).keys()
        os.kill(victim, signal.SIGKILL)
        self.kills += 1
        # Of a worker that was to leave, or to come, nobody says that it died.
        self.unsaid += any(map(self._is_rolling, self.several))
        self._say(fault, f"worker {victim}")
        await trio.sleep(0.2)  # its parent has heard of it, and so it is not ready any more

    async def _kill_an_engine(self, fault: Fault) -> None:
        async with self._engines:  # the others are there for those who were with it
            host = self.hosts[int(fault.which * len(self.hosts))]
            host.kill()
            killed = trio.current_time()
            self._say(fault, f"on {host.port}, for {fault.lasts:.1f} s")
            await trio.sleep(fault.lasts)
            await self.nursery.start(host.serve)
            self.dark.append((killed, trio.current_time()))
            await self.until_whole(20.0, of=_ENGINES)  # and breakers rest for longer each time

    async def _break_the_store(
        self, fault: Fault, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with self._births:
            self.stuck += await self.until_whole(60.0, of=_WORKERS)
            began = trio.current_time()
            self._say(fault, f"for {fault.lasts:.1f} s" if fault.what != "empty" else "everything")
            task_status.started()
            match fault.what:
                case "pause":
                    self.redis.pause()
                    await trio.sleep(fault.lasts)
                    self.redis.resume()
                case "restart":
                    self.redis.kill()
                    await trio.sleep(fault.lasts)
                    await trio.to_thread.run_sync(self.redis.start)
                case _:
                    await trio.to_thread.run_sync(partial(self.redis.command, "FLUSHALL"))
                    await trio.sleep(0.5)
            self.stuck += await self.until_whole(30.0, of=_WORKERS)
            self.silent.append((began, trio.current_time()))
