"""What a request costs with one worker and with several: ``python -m bench.workers``.

CPU of the gateway's whole process tree, the supervisor included: over the answers, with 16 kept
connections that each send their next request when they have the answer, or with ``--each 16`` as
many for each worker; and over the chunks of 200 streams.  The turns alternate, so that a machine
that gets busier is busier for all; medians.

With ``--apart``, so many gateways of one worker each carry the same load, from the same engine,
and share nothing: what they cost more than one is the machine's, and what workers cost more than
they do is the price of being one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from bench.peers import KEY, Place, citadel_config
from bench.processes import free_ports, resident_mb, running, wait_until_quiet


@attrs.frozen
class Turn:
    """CPU in microseconds, memory in MB, a scrape in milliseconds."""

    request: float
    chunk: float
    idle: float
    scrape: float
    failed: int


def _wait_for(port: int, workers: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if json.load(answer).get("workers", {"ready": 1})["ready"] == workers:
                    return
        except OSError:
            pass  # not yet
        time.sleep(0.1)
    raise SystemExit("the gateway does not become ready")


def _drive(gateways: Sequence[tuple[int, int]], *arguments: str) -> list[dict[str, Any]]:
    """Load each of *gateways*, a port and a process, at the same time."""
    drivers = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.load", *arguments, "--port", str(port), "--key", KEY,
             "--watch", str(pid)],
            stdout=subprocess.PIPE, text=True,
        )
        for port, pid in gateways
    ]  # fmt: skip
    said = [driver.communicate()[0] for driver in drivers]
    for driver in drivers:
        if driver.returncode:
            raise subprocess.CalledProcessError(driver.returncode, driver.args)
    return [json.loads(each) for each in said]


def _scrape(port: int) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        answer.read()
    return (time.perf_counter() - began) * 1e3


def take_turn(workers: int, gateways: int, seconds: float, connections: int) -> Turn:
    """With *connections*, and streams, divided among so many *gateways*."""
    with ExitStack() as stack:
        engine, *ports = free_ports(1 + 2 * gateways)
        stack.enter_context(running((sys.executable, "-m", "bench.engine", "--port", str(engine))))
        started = [
            _start(stack, workers, engine, ports[2 * at : 2 * at + 2]) for at in range(gateways)
        ]
        places = [(place.port, pid) for place, pid in started]
        idle = sum(resident_mb(pid) for _, pid in places)
        busy = ("whole", "--connections", str(connections // gateways), "--seconds")
        _drive(places, *busy, "1")
        whole = _drive(places, *busy, str(seconds))
        streams = _drive(
            places, "streams", "--connections", str(200 // gateways), "--chunks", "140"
        )
        metrics = started[0][0].metrics_port
        scrape = statistics.median(_scrape(metrics) for _ in range(20))
    windows = [found["window"] for found in streams]
    return Turn(
        request=_sum(whole, "cpu_s") / _sum(whole, "requests") * 1e6,
        chunk=_sum(windows, "cpu_s") / _sum(windows, "chunks") * 1e6,
        idle=idle,
        scrape=scrape,
        failed=int(_sum(whole, "failed") + _sum(streams, "failed")),
    )


def _start(stack: ExitStack, workers: int, engine: int, ports: Sequence[int]) -> tuple[Place, int]:
    port, metrics = ports
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    place = Place(folder=Path(folder), port=port, metrics_port=metrics, engine=engine)
    file = place.write("gateway.yaml", citadel_config(place, workers=workers))
    command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", file)
    process = stack.enter_context(running(command))
    _wait_for(port, workers)
    wait_until_quiet(process.pid)
    return place, process.pid


def _sum(found: Sequence[dict[str, Any]], name: str) -> float:
    return sum(each[name] for each in found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--each", type=int, help="connections for each worker; else 16 in all")
    parser.add_argument("--apart", type=int, nargs="*", default=[], help="so many gateways, too")
    asked = parser.parse_args()
    shapes = [(count, 1) for count in asked.workers] + [(1, count) for count in asked.apart]
    turns: dict[tuple[int, int], list[Turn]] = {shape: [] for shape in shapes}
    for _ in range(asked.rounds):
        for workers, gateways in shapes:
            connections = (asked.each or 0) * workers * gateways or 16
            turns[workers, gateways].append(
                take_turn(workers, gateways, asked.seconds, connections)
            )
    print(
        "| Workers | Gateways | CPU, us/request | CPU, us/chunk | Idle, MB | Scrape, ms | Failed |"
    )
    print("|---|---|---|---|---|---|---|")
    for (workers, gateways), found in turns.items():
        shown = [
            statistics.median(getattr(turn, name) for turn in found)
            for name in ("request", "chunk", "idle", "scrape")
        ]
        numbers = " | ".join(f"{number:.1f}" for number in shown)
        print(f"| {workers} | {gateways} | {numbers} | {sum(turn.failed for turn in found)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
