"""What a request costs with one worker and with several: ``python -m bench.workers``.

CPU of the gateway's whole process tree, the supervisor included: over the answers, with 16 kept
connections that each send their next request when they have the answer; and over the chunks of 200
streams.  With ``--each`` there are as many of both for each worker: then a worker has as much to do
at once, however many there are.  The turns alternate, so that a machine that gets busier is busier
for all; medians.

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


def _drive(gateways: Sequence[tuple[int, int]], *arguments: str) -> dict[str, Any]:
    """Load *gateways*, each a port and a process, with one driver: what drives is the same."""
    ports, processes = ([str(each[at]) for each in gateways] for at in (0, 1))
    said = subprocess.run(
        [sys.executable, "-m", "bench.load", *arguments, "--key", KEY,
         "--port", *ports, "--watch", *processes],
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[str, Any] = json.loads(said)
    return found


def _scrape(port: int) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        answer.read()
    return (time.perf_counter() - began) * 1e3


def take_turn(workers: int, gateways: int, seconds: float, connections: int, streams: int) -> Turn:
    """With *connections*, and *streams*, divided among so many *gateways*."""
    with ExitStack() as stack:
        engine, *ports = free_ports(1 + 2 * gateways)
        stack.enter_context(running((sys.executable, "-m", "bench.engine", "--port", str(engine))))
        started = [
            _start(stack, workers, engine, ports[2 * at : 2 * at + 2]) for at in range(gateways)
        ]
        places = [(place.port, pid) for place, pid in started]
        idle = sum(resident_mb(pid) for _, pid in places)
        busy = ("whole", "--connections", str(connections), "--seconds")
        _drive(places, *busy, "1")
        whole = _drive(places, *busy, str(seconds))
        flow = _drive(places, "streams", "--connections", str(streams), "--chunks", "140")
        metrics = started[0][0].metrics_port
        scrape = statistics.median(_scrape(metrics) for _ in range(20))
    window = flow["window"]
    return Turn(
        request=whole["cpu_s"] / whole["requests"] * 1e6,
        chunk=window["cpu_s"] / window["chunks"] * 1e6,
        idle=idle,
        scrape=scrape,
        failed=whole["failed"] + flow["failed"],
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--each", action="store_true", help="as many for each worker, not in all")
    parser.add_argument("--apart", type=int, nargs="*", default=[], help="so many gateways, too")
    asked = parser.parse_args()
    shapes = [(count, 1) for count in asked.workers] + [(1, count) for count in asked.apart]
    turns: dict[tuple[int, int], list[Turn]] = {shape: [] for shape in shapes}
    for _ in range(asked.rounds):
        for workers, gateways in shapes:
            times = workers * gateways if asked.each else 1
            turns[workers, gateways].append(
                take_turn(
                    workers, gateways, asked.seconds,
                    asked.connections * times, asked.streams * times,
                )
            )  # fmt: skip
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
