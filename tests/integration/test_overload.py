"""A real process that runs out of descriptors, and gets them back."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.support.gateway import CHAT, chat
from tests.support.raw_client import NoResponseError, RawClient, RawResponse
from tests.support.scripted_engine import ScriptedEngine, serve_tcp

PATIENCE = 30.0
IDLE = 80  # connections


@attrs.define
class Running:
    """A gateway: the ports of its two listeners."""

    pid: int
    port: int
    monitoring: int

    async def look(self, path: str) -> int:
        """The status of *path* on the second listener."""
        async with await RawClient.connect(self.monitoring) as client:
            return (await client.request("GET", path)).status

    async def until(self, status: int) -> None:
        """Until that is what ``/readyz`` says; the gateway looks twice a second."""
        while await self.look("/readyz") != status:  # noqa: ASYNC110  # it has no event for us
            await trio.sleep(0.05)

    async def open_descriptors(self, least: int) -> int:
        """How many it has, once it has come to have so many."""
        while (count := self._count()) < least:  # noqa: ASYNC110  # likewise
            await trio.sleep(0.01)
        return count

    async def least_descriptors(self) -> int:
        """How many it has when nobody looks at it."""
        counts = []
        for _ in range(20):
            counts.append(self._count())
            await trio.sleep(0.01)
        return min(counts)

    def _count(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def allow(self, descriptors: int) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (descriptors, descriptors))

    async def ask(self) -> RawResponse:
        async with await RawClient.connect(self.port) as client:
            return await client.request("POST", CHAT, chat("m"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def gateway(folder: Path, engine: int) -> AsyncIterator[Running]:
    port, monitoring = free_port(), free_port()
    config: dict[str, Any] = {
        "service": {"host": "127.0.0.1", "port": port, "workers": 1, "header_timeout": PATIENCE},
        "models": {"m": {"endpoint": f"http://127.0.0.1:{engine}"}},
        "monitoring": {"prometheus_port": monitoring},
    }
    file = folder / "gateway.yaml"
    file.write_text(json.dumps(config), "utf-8")
    command = [sys.executable, "-m", "citadel_gateway", "serve", "--config", str(file)]
    process = await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL)
    try:
        running = Running(process.pid, port, monitoring)
        while True:
            try:
                await running.until(200)
                break
            except OSError:
                await trio.sleep(0.05)
        yield running
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await process.wait()


async def test_requests_are_refused_before_the_last_descriptors_are_gone(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        port = await serve_tcp(ScriptedEngine(), nursery)
        with trio.fail_after(PATIENCE):
            async with gateway(tmp_path, port) as running:
                kept = await RawClient.connect(running.port)
                before = await kept.request("POST", CHAT, chat("m"))
                others = await running.least_descriptors()
                idle = [await RawClient.connect(running.port) for _ in range(IDLE)]
                running.allow(round(await running.open_descriptors(others + IDLE) / 0.92))

                await running.until(503)
                statuses = [await running.look(path) for path in ("/livez", "/metrics")]
                refused = await kept.request("POST", CHAT, chat("m"))
                with pytest.raises(NoResponseError):
                    await kept.read_head()
                await kept.aclose()

                for client in idle:
                    await client.aclose()
                await running.until(200)
                after = await running.ask()
        nursery.cancel_scope.cancel()

    assert (before.status, after.status) == (200, 200)
    assert statuses == [200, 200]
    assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.header("connection") == "close"
    assert 1 <= int(refused.header("retry-after") or 0) <= 5
