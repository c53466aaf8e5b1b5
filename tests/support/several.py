"""Several gateways, each a process of its own, that share a store and their engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import attrs
import trio

from tests.restarts.program import Log, end, port_of
from tests.support.ledger import Metrics, parse_metrics
from tests.support.raw_client import NoResponseError, RawClient, RawResponse
from tests.support.scripted_engine import MODEL, ScriptedEngine, serve_tcp

CHAT = "/v1/chat/completions"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class HasPort(Protocol):
    """Whom requests can be sent to."""

    @property
    def port(self) -> int: ...


@attrs.define(eq=False)
class GatewayProcess:
    """One of them."""

    process: trio.Process
    port: int
    log: Log

    async def request(
        self, method: str, path: str, body: object = None, key: str = ""
    ) -> RawResponse:
        headers = [("authorization", f"Bearer {key}")] if key else []
        async with await RawClient.connect(self.port) as client:
            return await client.request(method, path, body, headers)

    async def ask(self) -> RawResponse:
        return await self.request("POST", CHAT, ASK)

    async def metrics(self, key: str = "") -> Metrics:
        return parse_metrics((await self.request("GET", "/metrics", key=key)).body.decode())

    async def kill(self) -> None:
        """As ``kill -9`` does."""
        self.process.kill()
        await self.process.wait()

    def complaints(self) -> list[str]:
        """What the log says that is not just to be known."""
        return [line["event"] for line in self.log.lines if line.get("level") != "info"]

    def count(self, event: str) -> int:
        """How many lines tell of *event*."""
        return sum(line.get("event") == event for line in self.log.lines)


def configuration(
    ports: Sequence[int], store: Mapping[str, Any], **sections: Mapping[str, Any]
) -> dict[str, Any]:
    """One model, with an endpoint on each of *ports*; nothing is limited unless *sections* say."""
    config: dict[str, Any] = {
        "service": {"host": "127.0.0.1", "port": 0, "workers": 1, "lame_duck": 0},
        "models": {MODEL: {"endpoints": [{"url": f"http://127.0.0.1:{port}"} for port in ports]}},
        "monitoring": {"prometheus_port": None, "access_log": False},
        "performance": {"rate_limiting_enabled": False, "max_concurrent_requests": 1000},
        "load_balancer": {"slow_start": 0},
        "store": {"timeout": 2.0, **store},  # of the machine that this runs on little is promised
    }
    for section, options in sections.items():
        config[section] = {**config.get(section, {}), **options}
    return config


@asynccontextmanager
async def engines(count: int = 1) -> AsyncIterator[tuple[list[ScriptedEngine], list[int]]]:
    """Scripted engines on real sockets, and their ports."""
    async with trio.open_nursery() as nursery:
        made = [ScriptedEngine() for _ in range(count)]
        yield made, [await serve_tcp(engine, nursery) for engine in made]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def gateways(
    folder: Path, count: int, config: Mapping[str, Any]
) -> AsyncIterator[list[GatewayProcess]]:
    """*count* processes that serve by *config*."""
    file = folder / "gateway.json"  # JSON is YAML, too
    file.write_text(json.dumps(config))
    serves = "listening" if config["service"]["workers"] == 1 else "all workers serve"
    started: list[GatewayProcess] = []
    async with trio.open_nursery() as nursery:
        try:
            async with trio.open_nursery() as starting:
                for _ in range(count):
                    starting.start_soon(_start, file, serves, nursery, started)
            yield started
        finally:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as ending:
                    for gateway in started:
                        ending.start_soon(end, gateway.process)
            nursery.cancel_scope.cancel()


async def _start(
    file: Path, serves: str, nursery: trio.Nursery, started: list[GatewayProcess]
) -> None:
    reading, writing = os.pipe()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "citadel_gateway", "serve", "--config", str(file)],
        stdin=subprocess.DEVNULL,
        stderr=writing,
    )
    os.close(writing)
    log = Log()
    nursery.start_soon(log.read, reading)
    try:
        await log.wait_for(serves)
        listening = await log.wait_for("listening")
    except trio.TooSlowError:
        await end(process)
        raise
    started.append(GatewayProcess(process, port_of(listening), log))


@attrs.define
class Load:
    """Clients that ask without end, and count what they get.

    :param pause: seconds between two requests of a client.
    """

    clients: int = 2
    pause: float = 0.01
    statuses: Counter[int] = attrs.field(factory=Counter)
    slowest: float = 0.0
    began: float = attrs.field(factory=trio.current_time)
    first: float = 0.0  # when the first and the last of those that were let through was answered
    last: float = 0.0

    async def run(self, several: Sequence[HasPort], within: float) -> None:
        """Ask all of them for *within* seconds."""
        with trio.move_on_after(within):
            async with trio.open_nursery() as nursery:
                for gateway in several:
                    for _ in range(self.clients):
                        nursery.start_soon(self._ask, gateway)

    async def _ask(self, gateway: HasPort) -> None:
        while True:
            try:
                async with await RawClient.connect(gateway.port) as client:
                    while True:
                        await self._ask_once(client)
                        await trio.sleep(self.pause)
            except (OSError, NoResponseError, trio.BrokenResourceError):
                self.statuses[0] += 1
                await trio.sleep(self.pause)

    async def _ask_once(self, client: RawClient) -> None:
        began = trio.current_time()
        response = await client.request("POST", CHAT, ASK)
        ended = trio.current_time()
        self.statuses[response.status] += 1
        self.slowest = max(self.slowest, ended - began)
        if response.status == 200:
            self.first = self.first or began
            self.last = ended
