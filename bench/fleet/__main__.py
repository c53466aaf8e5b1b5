"""``python -m bench.fleet``: a fleet in virtual time, and the walls of real stores."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from bench.fleet import scenarios, walls
from bench.fleet.report import report
from bench.processes import free_ports, machine

RESULTS = Path(__file__).parent.parent / "results"
SIZES = (1, 3, 10, 30, 100)

Scenario = Callable[..., Awaitable[dict[str, Any]]]


def run(scenario: Scenario, *args: Any, **options: Any) -> dict[str, Any]:
    """In a time of its own, which costs nothing but the work."""
    began = time.monotonic()
    found: dict[str, Any] = trio.run(
        partial(scenario, *args, **options), clock=MockClock(autojump_threshold=0)
    )
    print(f"{scenario.__name__}{args}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return found


def simulation() -> dict[str, list[dict[str, Any]]]:
    return {
        "limits": [run(scenarios.limits, n, 1000.0) for n in SIZES],
        "load": [
            run(scenarios.limits, n, rate, 1.0, seconds)
            for rate, seconds in ((100.0, 20), (1000.0, 10), (10_000.0, 4))
            for n in SIZES
        ],
        "away": [
            *(run(scenarios.away, n, how=how) for n in (10, 100) for how in ("silent", "half")),
            run(scenarios.away, 100, how="forgets"),
            run(scenarios.away, 100, rate=10.0),
        ],
        "caps": [
            run(scenarios.caps, n, cap, demand, 40)
            for n, cap in ((3, 20), (10, 200), (30, 200), (100, 200), (100, 50))
            for demand in (0.8, 1.5)
        ],
        "churn": [run(scenarios.churn, n, 100, cuts) for n in (10, 30) for cuts in (False, True)],
        "idle": [
            *(run(scenarios.idle, n, 1, 120) for n in SIZES),
            *(run(scenarios.idle, n, 100, 60) for n in (1, 10)),
            run(scenarios.idle, 100, 20, 60),
        ],
        "breaker": [run(scenarios.breaker, n) for n in (3, 10, 30, 100)],
        "death": [run(scenarios.death, 10, 100), run(scenarios.death, 100, 200, 4)],
    }


def real_stores() -> dict[str, Any]:
    found: dict[str, Any] = {
        "lmdb": [walls.least(partial(walls.lmdb, n), "us_per_take") for n in (1, 2, 4, 8)]
    }
    if shutil.which("redis-server"):
        found["redis"] = walls.redis(free_ports(1)[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.fleet")
    parser.add_argument("--only", choices=["simulation", "stores", "report"])
    asked = parser.parse_args()
    file = RESULTS / "fleet.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if asked.only in (None, "stores"):
        found["stores"] = {
            **real_stores(),
            "machine": machine(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
    if asked.only in (None, "simulation"):
        found["simulation"] = simulation()
    file.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "fleet.md").write_text(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
