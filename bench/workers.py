"""What a request costs with one worker and with several: ``python -m bench.workers``.

CPU of the gateway's whole process tree, the supervisor included: over the answers, with 16 kept
connections that each send their next request when they have the answer; and over the chunks of 200
streams.  With ``--each`` there are as many of both for each worker: then a worker has as much to do
at once, however many there are.

With ``--apart``, so many gateways of one worker each carry the same load, from the same engine and
driver, and share nothing: what they cost more than one is the machine's, and what workers cost more
than they do is the price of being one.  With ``--nginx``, nginx does the same with as many workers.

Where Linux groups processes by session (`kernel.sched_autogroup_enabled`), four gateways get four
times the time of one with four workers, and are less often interrupted: switch that off.

All run at the same time and are loaded in turns of seconds.  A machine that gets busier is busier
for all of a round, so each is compared to the same program's first in the same round; medians.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
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

from bench.peers import KEY, Place, citadel_config, first_answer, launch_nginx
from bench.processes import free_ports, resident_mb, running, wait_until_quiet


@attrs.frozen
class Turn:
    """CPU in microseconds, a scrape in milliseconds."""

    request: float
    chunk: float
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
    def once() -> float:
        began = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            answer.read()
        return (time.perf_counter() - began) * 1e3

    return statistics.median(once() for _ in range(5))


@attrs.frozen
class Shape:
    """So many workers in each of so many gateways."""

    workers: int
    gateways: int = 1
    program: str = "citadel"


@attrs.define(eq=False)
class Contestant:
    """The gateways of one shape, each a port and a process, and what they took in each round."""

    places: list[tuple[int, int]]
    metrics_port: int | None
    times: int  # the load
    idle: float  # MB
    turns: list[Turn] = attrs.field(factory=list)

    def take_turn(self, asked: argparse.Namespace) -> Turn:
        connections, streams = asked.connections * self.times, asked.streams * self.times
        seconds = ("--seconds", str(asked.seconds))
        whole = _drive(self.places, "whole", "--connections", str(connections), *seconds)
        flow = _drive(
            self.places, "streams", "--connections", str(streams), "--leave",
            "--chunks", "200", "--window", str(asked.seconds),
        )  # fmt: skip
        window = flow["window"]
        return Turn(
            request=whole["cpu_s"] / whole["requests"] * 1e6,
            chunk=window["cpu_s"] / window["chunks"] * 1e6,
            scrape=_scrape(self.metrics_port) if self.metrics_port else math.nan,
            failed=whole["failed"] + flow["failed"],
        )

    def median(self, what: str) -> float:
        return statistics.median(self._took(what))

    def times_of(self, first: Contestant, what: str) -> float:
        """How many times what *first* took in the same rounds."""
        pairs = zip(self._took(what), first._took(what), strict=True)
        return statistics.median(own / theirs for own, theirs in pairs)

    def _took(self, what: str) -> list[float]:
        return [getattr(turn, what) for turn in self.turns]


def _contestant(
    stack: ExitStack, shape: Shape, engine: int, ports: list[int], times: int
) -> Contestant:
    """Takes its own of *ports*."""
    started = [
        _start(stack, shape, engine, ports.pop(), ports.pop()) for _ in range(shape.gateways)
    ]
    return Contestant(
        places=[(place.port, pid) for place, pid in started],
        metrics_port=started[0][0].metrics_port if shape.program == "citadel" else None,
        times=times,
        idle=sum(resident_mb(pid) for _, pid in started),
    )


def _start(
    stack: ExitStack, shape: Shape, engine: int, port: int, metrics: int
) -> tuple[Place, int]:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    place = Place(folder=Path(folder), port=port, metrics_port=metrics, engine=engine)
    if shape.program == "nginx":
        command = launch_nginx(shutil.which("nginx") or "nginx", place, shape.workers).command
        process = stack.enter_context(running(command))
        first_answer(port, process)
        return place, process.pid
    file = place.write("gateway.yaml", citadel_config(place, workers=shape.workers))
    command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", file)
    process = stack.enter_context(running(command))
    _wait_for(port, shape.workers)
    wait_until_quiet(process.pid)
    return place, process.pid


def _are_sessions_groups() -> bool:
    file = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return file.exists() and file.read_text().strip() == "1"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--each", action="store_true", help="as many for each worker, not in all")
    parser.add_argument("--apart", type=int, nargs="*", default=[], help="so many gateways, too")
    parser.add_argument("--nginx", action="store_true", help="nginx with as many workers, too")
    asked = parser.parse_args()
    shapes = [Shape(count) for count in asked.workers] + [Shape(1, count) for count in asked.apart]
    if asked.apart and _are_sessions_groups():
        print(
            "gateways apart get more time: sysctl kernel.sched_autogroup_enabled=0", file=sys.stderr
        )
    if asked.nginx:
        shapes += [Shape(count, program="nginx") for count in asked.workers]
    with ExitStack() as stack:
        engine, *ports = free_ports(1 + 2 * sum(each.gateways for each in shapes))
        stack.enter_context(running((sys.executable, "-m", "bench.engine", "--port", str(engine))))
        contestants = [
            _contestant(
                stack, each, engine, ports, each.workers * each.gateways if asked.each else 1
            )
            for each in shapes
        ]
        for each in contestants:  # a round that does not count: all have seen every kind of load
            each.take_turn(asked)
        for _ in range(asked.rounds):
            for each in contestants:
                each.turns.append(each.take_turn(asked))
    print("| | Workers | Gateways | us/request | | us/chunk | | Idle, MB | Scrape, ms | Failed |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for shape, each in zip(shapes, contestants, strict=True):
        first = contestants[next(i for i, s in enumerate(shapes) if s.program == shape.program)]
        cpu = " | ".join(
            f"{each.median(what):.1f} | {each.times_of(first, what):.2f}"
            for what in ("request", "chunk")
        )
        failed = sum(turn.failed for turn in each.turns)
        print(
            f"| {shape.program} | {shape.workers} | {shape.gateways} | {cpu} "
            f"| {each.idle:.1f} | {each.median('scrape'):.1f} | {failed} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
