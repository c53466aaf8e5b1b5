"""A gateway in a process of its own, seen from outside: its log, its metrics, its descriptors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from tests.support.raw_client import RawClient

CLOCKS = {
    "header_timeout": 1.5,
    "body_timeout": 1.5,
    "keep_alive_timeout": 1.5,
    "write_timeout": 1.5,
    "drain_timeout": 2.0,
    "lame_duck": 0.1,
}
"""The server's clocks in seconds: short enough to be waited for."""

_STARTS_WITHIN = 20.0


@attrs.frozen
class Levels:
    """What the gateway holds, by its own account and by the kernel's."""

    client_connections: int
    in_flight: int
    queued: int
    descriptors: int  # without those of connections to engines, which come and go
    tasks: int | None  # likewise; None while the gateway does not tell


@attrs.define(eq=False)
class GatewayProcess:
    process: trio.Process
    port: int = 0
    log: list[dict[str, Any]] = attrs.field(factory=list)
    complaints: list[str] = attrs.field(factory=list)
    _said: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def read_log(self) -> None:
        """Keeps what is about the gateway itself, and complains of what should never be said."""
        assert self.process.stderr is not None
        unread = b""
        async for data in self.process.stderr:
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                self._read_line(line)
            self._said.set()
            self._said = trio.Event()

    def _read_line(self, line: bytes) -> None:
        try:
            fields = json.loads(line)
        except ValueError:
            self.complaints.append(f"not a log line: {line[:300]!r}")
            return
        if fields.get("event") == "request":
            return
        self.log.append(fields)
        if fields.get("level") in {"error", "critical"} or "exception" in fields:
            self.complaints.append(f"in the log: {json.dumps(fields)[:2000]}")

    async def wait_for(self, event: str) -> dict[str, Any]:
        while True:
            for fields in self.log:
                if fields.get("event") == event:
                    return fields
            await self._said.wait()

    async def levels(self) -> Levels:
        """Asked over a connection of its own, which is not counted."""
        async with await RawClient.connect(self.port) as client:
            page = (await client.request("GET", "/metrics")).body.decode()
            descriptors = self.descriptors()
        upstream = int(_total(page, "citadel_gateway_upstream_connections"))
        tasks = _find(page, "citadel_gateway_tasks")
        return Levels(
            client_connections=int(_total(page, "citadel_gateway_client_connections")) - 1,
            in_flight=int(_total(page, "citadel_gateway_in_flight_requests")),
            queued=int(_total(page, "citadel_gateway_queue_depth")),
            descriptors=descriptors - upstream,
            tasks=None if not tasks else int(sum(tasks)),
        )

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def resident_mb(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def _find(page: str, name: str) -> list[float]:
    lines = (line for line in page.splitlines() if line.startswith((name + " ", name + "{")))
    return [float(line.rpartition(" ")[2]) for line in lines]


def _total(page: str, name: str) -> float:
    found = _find(page, name)
    if not found:
        raise ValueError(f"/metrics does not tell {name}")
    return sum(found)


@asynccontextmanager
async def gateway_process(
    folder: Path, models: dict[str, int], *, src: str | None, **service: Any
) -> AsyncIterator[GatewayProcess]:
    """A gateway in front of engines on loopback; killed at the end unless it has stopped.

    :param models: the port of each model's engine; the first is the default.
    :param src: a folder with another version's `citadel_gateway`; by default, the one on the path.
    """
    config = folder / "gateway.yaml"
    config.write_text(json.dumps(_config(models, service)), "utf-8")  # JSON is YAML, too
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "citadel_gateway", "serve", "--config", str(config)],
        stderr=subprocess.PIPE,
        env=environment(src),
    )
    found = GatewayProcess(process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.read_log)
        try:
            with trio.fail_after(_STARTS_WITHIN):
                listening = await found.wait_for("listening")
            found.port = int(listening["address"].rpartition(":")[2])
            yield found
        finally:
            if process.returncode is None:
                process.kill()
            with trio.move_on_after(5, shield=True):
                await process.wait()
            nursery.cancel_scope.cancel(reason="the gateway has ended")


def environment(src: str | None) -> dict[str, str]:
    """For a Python that imports the gateway from *src*."""
    env = {**os.environ, "PYTHONDEVMODE": "", "PYTHONUNBUFFERED": "1"}
    if src is not None:
        env["PYTHONPATH"] = os.pathsep.join(_importable(Path(src)))
    return env


def _importable(src: Path) -> Iterable[str]:
    """*src* may be a checkout or its `src` folder."""
    for folder in (src / "src", src):
        if (folder / "citadel_gateway").is_dir():
            return [str(folder.resolve())]
    raise SystemExit(f"there is no citadel_gateway in {src}")


def _config(models: dict[str, int], service: dict[str, Any]) -> dict[str, Any]:
    return {
        "service": {"host": "127.0.0.1", "port": 0, "workers": 1, **CLOCKS, **service},
        "gateway": {"intelligent_routing": False, "default_model": next(iter(models))},
        "models": {
            name: {
                "endpoint": f"http://127.0.0.1:{port}",
                "max_concurrent": 1000,
                # Streams of the slow readers' phase may be silent for as long as they like.
                "timeouts": {"idle": 60},
            }
            for name, port in models.items()
        },
        "monitoring": {"prometheus_port": None},
        "performance": {"rate_limiting_enabled": False, "max_concurrent_requests": 3000},
    }
