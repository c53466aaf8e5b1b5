"""What a request costs with one worker and with several: ``python -m bench.workers``.

CPU of the gateway's whole process tree, the supervisor included: over the answers, with 16 kept
connections that each send their next request when they have the answer, or with ``--each 16`` as
many for each worker; and over the chunks of 200 streams.  The turns alternate, so that a machine
that gets busier is busier for all; medians.
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


def _drive(port: int, pid: int, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.load", *arguments]
    command += ["--port", str(port), "--key", KEY, "--watch", str(pid)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _scrape(port: int) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        answer.read()
    return (time.perf_counter() - began) * 1e3


def take_turn(workers: int, seconds: float, connections: int) -> Turn:
    port, metrics, engine = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder=Path(folder), port=port, metrics_port=metrics, engine=engine)
        file = place.write("gateway.yaml", citadel_config(place, workers=workers))
        behind = (sys.executable, "-m", "bench.engine", "--port", str(engine))
        command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", file)
        with running(behind), running(command) as process:
            _wait_for(port, workers)
            wait_until_quiet(process.pid)
            idle = resident_mb(process.pid)
            busy = ("whole", "--connections", str(connections), "--seconds")
            _drive(port, process.pid, *busy, "1")
            whole = _drive(port, process.pid, *busy, str(seconds))
            streams = _drive(
                port, process.pid, "streams", "--connections", "200", "--chunks", "140"
            )
            scrape = statistics.median(_scrape(metrics) for _ in range(20))
    window = streams["window"]
    return Turn(
        request=whole["cpu_s"] / whole["requests"] * 1e6,
        chunk=window["cpu_s"] / window["chunks"] * 1e6,
        idle=idle,
        scrape=scrape,
        failed=whole["failed"] + streams["failed"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--each", type=int, help="connections for each worker; else 16 in all")
    asked = parser.parse_args()
    turns: dict[int, list[Turn]] = {count: [] for count in asked.workers}
    for _ in range(asked.rounds):
        for count in asked.workers:
            turns[count].append(take_turn(count, asked.seconds, (asked.each or 0) * count or 16))
    print("| Workers | CPU, us/request | CPU, us/chunk | Idle, MB | Scrape, ms | Failed |")
    print("|---|---|---|---|---|---|")
    for count, found in turns.items():
        shown = [
            statistics.median(getattr(turn, name) for turn in found)
            for name in ("request", "chunk", "idle", "scrape")
        ]
        numbers = " | ".join(f"{number:.1f}" for number in shown)
        print(f"| {count} | {numbers} | {sum(turn.failed for turn in found)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
