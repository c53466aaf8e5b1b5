"""A gateway under load whose configuration changes, or that is replaced, again and again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from tests.restarts.load import Load, Tally, answer
from tests.support.ledger import Metrics, parse_metrics, total
from tests.support.raw_client import RawClient
from tests.support.scripted_engine import MODEL, ScriptedEngine, serve_tcp

# What the service manager does between fork and exec: the socket becomes descriptor 3, and the
# process is told its own number.
_AS_MANAGER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="api")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
_STARTS_WITHIN = 30.0


@attrs.frozen
class Result:
    """What became of the load.

    :param executed: what the engines were asked; more than was answered were work done twice.
    :param tasks: how many the gateway had before and after.
    """

    tally: Tally
    seconds: float
    executed: int
    tasks: tuple[int, int] = (0, 0)

    @property
    def twice(self) -> int:
        return self.executed - self.tally.answered.total()

    @property
    def is_clean(self) -> bool:
        return not self.tally.failed and not self.twice and self.tasks[0] == self.tasks[1]


@attrs.define(eq=False)
class Log:
    """Log lines of one or more processes that write to the same pipe."""

    lines: list[dict[str, Any]] = attrs.field(factory=list)
    _said: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def read(self, descriptor: int) -> None:
        unread = b""
        async with trio.lowlevel.FdStream(descriptor) as pipe:
            async for data in pipe:
                *lines, unread = (unread + data).split(b"\n")
                self.lines += [_parse(line) for line in lines]
                self._said.set()
                self._said = trio.Event()

    async def wait_for(
        self, event: str, start: int = 0, within: float = _STARTS_WITHIN, times: int = 1
    ) -> dict[str, Any]:
        """The first line from *start* on that tells of *event*, or the one that tells of it so
        many *times*.
        """
        with trio.fail_after(within):
            while True:
                found = [line for line in self.lines[start:] if line.get("event") == event]
                if len(found) >= times:
                    return found[times - 1]
                await self._said.wait()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(line)
    except ValueError:
        return {"event": "not a log line", "text": line.decode(errors="replace")}
    return fields


@attrs.define(eq=False)
class Scene:
    """Two engines, a configuration file and the way to start a gateway in front of them."""

    file: Path
    engines: list[ScriptedEngine]
    ports: list[int]
    writing: int
    log: Log

    def write(self, turn: int = 0, **service: Any) -> None:
        """Another configuration for each *turn*: endpoints, weights, limits and algorithms move."""
        first, second = (f"http://127.0.0.1:{port}" for port in self.ports)
        urls = ([first, second], [second], [second, first], [first])[turn % 4]
        config: dict[str, Any] = {
            "service": {"host": "127.0.0.1", "port": 0, "workers": 1, "lame_duck": 0.1, **service},
            "models": {
                MODEL: {
                    "endpoints": [{"url": url, "weight": 1 + turn % 3} for url in urls],
                    "max_concurrent": 50 + turn % 7,
                }
            },
            "load_balancer": {
                "algorithm": ("round_robin", "least_connections", "power_of_two")[turn % 3]
            },
            "monitoring": {"prometheus_port": None, "access_log": False},
            "performance": {"rate_limiting_enabled": False},
        }
        if turn % 5 == 4:
            config["models"]["another"] = {"endpoint": first}
        self.put(json.dumps(config))  # JSON is YAML, too

    def put(self, text: str) -> None:
        """Another file in the place of the one that is there."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.file)

    @property
    def executed(self) -> int:
        return sum(len(engine.posts) for engine in self.engines)

    async def start(
        self, listener: socket.socket | None = None, env: dict[str, str] | None = None
    ) -> trio.Process:
        command = [sys.executable, "-m", "citadel_gateway", "serve", "--config", str(self.file)]
        if listener is not None:
            command = [sys.executable, "-c", _AS_MANAGER, str(listener.fileno()), *command[1:]]
        return await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stderr=self.writing,
            env={**os.environ, **(env or {})},
            pass_fds=() if listener is None else (listener.fileno(),),
        )


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    async with trio.open_nursery() as nursery:
        engines = [ScriptedEngine(default=answer), ScriptedEngine(default=answer)]
        ports = [await serve_tcp(engine, nursery) for engine in engines]
        reading, writing = os.pipe()
        made = Scene(directory / "gateway.yaml", engines, ports, writing, Log())
        made.write()
        nursery.start_soon(made.log.read, reading)
        try:
            yield made
        finally:
            os.close(writing)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def under_load(port: int) -> AsyncIterator[Tally]:
    """Clients ask during the body; when it is done they come to their end."""
    load = Load(port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await trio.sleep(0.5)
        yield load.tally
        await trio.sleep(0.5)
        load.tally.stopping = True


async def reload_often(directory: Path, times: int, workers: int = 1) -> Result:
    """One gateway, *times* configurations: by signal, and every tenth by the file alone."""
    async with scene(directory) as here:
        here.write(workers=workers)
        process = await here.start()
        try:
            await here.log.wait_for("listening", times=workers)
            port = port_of(await here.log.wait_for("listening"))
            before = await _idle_tasks(port)
            began = trio.current_time()
            async with under_load(port) as tally:
                for turn in range(1, times + 1):
                    start = len(here.log.lines)
                    here.write(turn, workers=workers)
                    if turn % 10:
                        process.send_signal(signal.SIGHUP)
                    await here.log.wait_for("configuration", start, times=workers)
                    await trio.sleep(0.02 * (turn % 5))
            seconds = trio.current_time() - began
            here.write(workers=workers)
            start = len(here.log.lines)
            process.send_signal(signal.SIGHUP)
            await here.log.wait_for("configuration", start, times=workers)
            tasks = (before, await _idle_tasks(port))
            _note_complaints(here.log, tally)
        finally:
            await end(process)
    return Result(tally, seconds, here.executed, tasks)


async def restart_often(directory: Path, times: int, workers: int = 1) -> Result:
    """A socket that stays, and one process after the other on it, as a service manager does."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        async with scene(directory) as here:
            here.write(workers=workers)
            process = await here.start(listener)
            try:
                await here.log.wait_for("listening", times=workers)
                began = trio.current_time()
                async with under_load(listener.getsockname()[1]) as tally:
                    for _ in range(times):
                        process.terminate()
                        if code := await process.wait():
                            tally.failed[f"the gateway ended with {code}"] += 1
                        start = len(here.log.lines)
                        process = await here.start(listener)
                        await here.log.wait_for("listening", start, times=workers)
                        await trio.sleep(0.3)
                seconds = trio.current_time() - began
                _note_complaints(here.log, tally)
            finally:
                await end(process)
    return Result(tally, seconds, here.executed)


async def hand_over_often(directory: Path, times: int) -> Result:
    """Each process starts the next one, and hands it the socket."""
    async with scene(directory) as here:
        process = await here.start()
        pids = [process.pid]
        try:
            port = port_of(await here.log.wait_for("listening"))
            began = trio.current_time()
            async with under_load(port) as tally:
                for _ in range(times):
                    start = len(here.log.lines)
                    os.kill(pids[-1], signal.SIGUSR2)
                    pids.append((await here.log.wait_for("handed over", start))["pid"])
                    await here.log.wait_for("stopped", start)
                    await trio.sleep(0.3)
            seconds = trio.current_time() - began
            _note_complaints(here.log, tally)
        finally:
            for pid in pids[1:]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            await end(process)
    return Result(tally, seconds, here.executed)


async def roll_often(directory: Path, times: int, workers: int) -> Result:
    """*workers* processes, each replaced *times* times, one after the other."""
    async with scene(directory) as here:
        here.write(workers=workers)
        process = await here.start()
        try:
            port = port_of(await here.log.wait_for("listening"))
            await here.log.wait_for("all workers serve")
            began = trio.current_time()
            async with under_load(port) as tally:
                for _ in range(times):
                    start = len(here.log.lines)
                    process.send_signal(signal.SIGUSR2)
                    rolled = "all workers have been replaced"
                    await here.log.wait_for(rolled, start, _STARTS_WITHIN * workers)
                    await trio.sleep(0.3)
            seconds = trio.current_time() - began
            async with await RawClient.connect(port) as client:
                page = (await client.request("GET", "/metrics")).body.decode()
            _note_miscounts(parse_metrics(page), tally)
            process.terminate()
            if code := await process.wait():
                tally.failed[f"the gateway ended with {code}"] += 1
            _note_complaints(here.log, tally)
        finally:
            await end(process)
    return Result(tally, seconds, here.executed)


async def end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(10):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def _note_complaints(log: Log, tally: Tally) -> None:
    for line in log.lines:
        if line.get("level") == "error" or line["event"] == "not a log line":
            tally.failed[f"in the log: {json.dumps(line)[:2000]}"] += 1


def _note_miscounts(page: Metrics, tally: Tally) -> None:
    """What all workers that there ever were have counted is what was answered."""
    answered = tally.answered.total()
    for name, labels in (
        ("citadel_gateway_requests_total", {"outcome": "ok"}),
        ("citadel_gateway_request_duration_seconds_count", {}),
    ):
        if (counted := total(page, name, **labels)) != answered:
            tally.failed[f"{name}: {counted:.0f} where {answered} were answered"] += 1


def port_of(listening: dict[str, Any]) -> int:
    return int(listening["address"].rpartition(":")[2])


async def _idle_tasks(port: int) -> int:
    """The gateway's tasks once nobody is connected but who asks: the fewest of some looks."""
    seen = []
    for _ in range(10):
        await trio.sleep(0.2)
        async with await RawClient.connect(port) as client:
            page = (await client.request("GET", "/metrics")).body.decode()
        seen += [
            int(float(line.rpartition(" ")[2]))
            for line in page.splitlines()
            if line.startswith("citadel_gateway_tasks ")
        ]
    return min(seen)
