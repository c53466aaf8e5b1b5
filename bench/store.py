"""What a shared store adds to a request: ``python -m bench.store``, half a minute.

The same gateway without a store, with LMDB and with a redis-server of its own, each put under the
same load in turns.  CPU of the gateway's process alone; the server's own is told beside it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.loads import Load, drive
from bench.peers import Place, citadel_config, first_answer
from bench.processes import Process, cpu_seconds, free_ports, running, wait_until_quiet

ROUNDS = 5
LOADS = (
    Load(name="1 connection", connections=1, seconds=1.0),
    Load(name="16 connections", connections=16, seconds=1.0),
    Load(name="64 connections", connections=64, seconds=1.0),
)


def start(engine: int, store: dict[str, Any], stack: contextlib.ExitStack) -> tuple[int, Process]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    port, metrics = free_ports(2, first=22000)  # what is below may not be listened on yet
    place = Place(folder=folder, port=port, metrics_port=metrics, engine=engine)
    if store["kind"] == "lmdb":  # where it is by default, too: in memory
        memory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        store = {**store, "path": memory}
    text = citadel_config(place) + f"store: {json.dumps(store)}\n"
    file = place.write("citadel.yaml", text)
    command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", file)
    process = stack.enter_context(running(command, log=folder / "output.log"))
    first_answer(port, process)
    wait_until_quiet(process.pid)
    return port, process


def start_redis(port: int, stack: contextlib.ExitStack) -> tuple[str, Process]:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    words = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder)
    return f"redis://127.0.0.1:{port}", stack.enter_context(running(("redis-server", *words)))


def main() -> None:
    with contextlib.ExitStack() as stack:
        engine, redis = free_ports(2)
        stack.enter_context(running((sys.executable, "-m", "bench.engine", "--port", str(engine))))
        stores: dict[str, dict[str, Any]] = {"memory": {}, "lmdb": {}}
        server: Process | None = None
        if shutil.which("redis-server"):
            url, server = start_redis(redis, stack)
            stores["redis"] = {"url": url}
        gateways = {
            kind: start(engine, {"kind": kind, **store}, stack) for kind, store in stores.items()
        }
        for load in LOADS:
            _show(load, gateways, server)


def _show(load: Load, gateways: dict[str, tuple[int, Process]], server: Process | None) -> None:
    cpu: dict[str, list[float]] = {kind: [] for kind in gateways}
    p50: dict[str, list[float]] = {kind: [] for kind in gateways}
    serving: list[float] = []
    for _ in range(ROUNDS):
        for kind, (port, process) in gateways.items():
            before = cpu_seconds(server.pid) if server else 0.0
            report = drive(load, port, process.pid)
            if report["failed"]:
                raise RuntimeError(f"{kind}: {report}")
            cpu[kind].append(1e6 * report["cpu_s"] / report["requests"])
            p50[kind].append(report["p50_ms"])
            if kind == "redis" and server:
                serving.append(1e6 * (cpu_seconds(server.pid) - before) / report["requests"])
    base = min(cpu["memory"])  # of the rounds that were least disturbed
    for kind in gateways:
        least = min(cpu[kind])
        beside = f", {statistics.median(serving):.0f} us in redis-server" if kind == "redis" else ""
        print(
            f"{load.name:16} {kind:8} {least:6.0f} us CPU a request ({least - base:+.0f}), "
            f"p50 {statistics.median(p50[kind]):.2f} ms{beside}"
        )


if __name__ == "__main__":
    main()
