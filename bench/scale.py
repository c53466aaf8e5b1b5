"""This gateway with a thousand endpoints: what choosing costs, and what `/metrics` costs.

All endpoints are the one engine, under paths that it ignores.  Health checks are far apart, so
that a thousand probes do not fall into a measurement of a second.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.loads import Load, drive
from bench.peers import Place, Unavailable, citadel_config, first_answer
from bench.processes import Process, free_ports, running, wait_until_quiet

FEW, MANY = 4, 1000
ALGORITHMS = ("round_robin", "least_connections")
WHOLE = Load(name="16 connections", connections=16, seconds=2.0)
STREAMS = Load(name="100 streams", connections=100, pace=20, over=0.5, window=4.0, slack=1.0)
SCRAPES = 20


def start(
    engine: int, endpoints: int, algorithm: str, stack: contextlib.ExitStack
) -> tuple[Place, Process]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    port, metrics = free_ports(2)
    place = Place(folder=folder, port=port, metrics_port=metrics, engine=engine)
    file = place.write(
        "citadel.yaml",
        citadel_config(place, endpoints=endpoints, algorithm=algorithm, interval=600),
    )
    command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", file)
    process = stack.enter_context(running(command, log=folder / "output.log"))
    first_answer(place.port, process)
    wait_until_quiet(process.pid)
    drive(WHOLE, place.port)  # every endpoint has had a request, and has its counters
    return place, process


def choosing(engine: int, algorithm: str, rounds: int) -> dict[str, Any]:
    """CPU per whole request with few and with many endpoints, in turns."""
    found: dict[int, list[dict[str, Any]]] = {FEW: [], MANY: []}
    with contextlib.ExitStack() as stack:
        gateways = {count: start(engine, count, algorithm, stack) for count in (FEW, MANY)}
        for _ in range(max(3, rounds)):
            for count, (place, process) in gateways.items():
                found[count].append(drive(WHOLE, place.port, process.pid))
    cost = {
        count: statistics.median(1e6 * r["cpu_s"] / max(1, r["requests"]) for r in reports)
        for count, reports in found.items()
    }
    return {
        "few_us": round(cost[FEW], 1),
        "many_us": round(cost[MANY], 1),
        "failed": sum(r["failed"] for reports in found.values() for r in reports),
        "raw": {str(count): reports for count, reports in found.items()},
    }


def scrape(url: str, times: list[float], pause: float) -> None:
    for _ in range(SCRAPES):
        began = time.monotonic()
        with urllib.request.urlopen(url, timeout=30) as answer:
            answer.read()
        times.append(time.monotonic() - began)
        time.sleep(pause)


def scraping(engine: int) -> dict[str, Any]:
    """How long a scrape takes, and whether the streams notice."""
    with contextlib.ExitStack() as stack:
        place, _ = start(engine, MANY, "round_robin", stack)
        url = f"http://127.0.0.1:{place.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            size = len(answer.read())
        idle: list[float] = []
        scrape(url, idle, 0.05)
        undisturbed = drive(STREAMS, place.port)
        busy: list[float] = []

        def later() -> None:
            time.sleep(1.2)  # all streams are open, and stay so for the scrapes
            scrape(url, busy, 0.1)

        scraper = threading.Thread(target=later)
        scraper.start()
        disturbed = drive(STREAMS, place.port)
        scraper.join()
    return {
        "kilobytes": round(size / 1024),
        "idle_ms": round(statistics.median(idle) * 1000, 1),
        "busy_ms": round(statistics.median(busy) * 1000, 1),
        "busy_max_ms": round(max(busy) * 1000, 1),
        "gap_undisturbed_ms": undisturbed.get("largest_gap_ms"),
        "gap_disturbed_ms": disturbed.get("largest_gap_ms"),
        "nominal_gap_ms": 1000 / STREAMS.pace,
        "failed": undisturbed["failed"] + disturbed["failed"],
    }


def measure(engine: int, rounds: int) -> dict[str, Any]:
    """A version that cannot do this is a finding, not the end of the run."""
    try:
        return {
            "few": FEW,
            "many": MANY,
            "choosing": {name: choosing(engine, name, rounds) for name in ALGORITHMS},
            "metrics": scraping(engine),
        }
    except (Unavailable, OSError, LookupError, ValueError) as problem:
        return {"problem": f"{type(problem).__name__}: {problem}"}
