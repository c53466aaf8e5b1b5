"""This gateway's own figures, measured in one run: hang-ups, start, memory.

    python -m bench.figures            # about a minute; writes bench/results/figures.{json,md}

What it costs, beside other gateways, is `bench.compare`'s business.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.peers import KEY, Place, citadel_config, first_answer
from bench.processes import (
    Process,
    free_ports,
    machine,
    peak_mb,
    resident_mb,
    running,
)
from citadel_gateway.io.descriptors import raise_limit

ROUNDS = 5
RESULTS = Path(__file__).parent / "results"


@contextmanager
def gateway(engine: int) -> Iterator[tuple[Place, Process]]:
    with tempfile.TemporaryDirectory() as folder:
        port, metrics = free_ports(2)
        place = Place(folder=Path(folder), port=port, metrics_port=metrics, engine=engine)
        file = place.write("gateway.yaml", citadel_config(place, interval=5))
        command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", file)
        with running(command) as process:
            yield place, process


def wait_until(path: str, port: int, process: Process) -> float:
    began = time.monotonic()
    while time.monotonic() - began < 20 and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1):
                return time.monotonic() - began
        except (urllib.error.URLError, OSError):
            time.sleep(0.01)
    raise RuntimeError(f"no good answer to {path} on port {port}")


def hang_ups() -> dict[str, Any]:
    (engine,) = free_ports(1, 20500)
    with gateway(engine) as (place, ours):
        wait_until("/livez", place.port, ours)
        watcher = subprocess.Popen(
            (
                sys.executable, "-m", "bench.hang_up", "--port", str(place.port), "--key", KEY,
                "--engine-port", str(engine), "--pid", str(ours.pid),
            ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until("/readyz", place.port, ours)
        out, _ = watcher.communicate(b"go\n", timeout=120)
        report: dict[str, Any] = json.loads(out)
        report["memory_peak_mb"] = peak_mb(ours.pid)
        return report


def start_time() -> dict[str, Any]:
    times: list[float] = []
    idle: list[float] = []
    (engine,) = free_ports(1, 20500)
    with running((sys.executable, "-m", "bench.engine", "--port", str(engine))):
        for _ in range(ROUNDS):
            with gateway(engine) as (place, ours):
                times.append(wait_until("/readyz", place.port, ours))
                first_answer(place.port, ours)
                idle.append(resident_mb(ours.pid))
    return {
        "median_s": round(statistics.median(times), 2),
        "max_s": round(max(times), 2),
        "memory_idle_mb": round(statistics.median(idle), 1),
    }


def markdown(report: dict[str, Any]) -> str:
    gone, start = report["hang_up"], report["start"]
    lines = [
        f"- a hang-up is seen by the engine after {gone['p50_ms']} ms (p50), {gone['p99_ms']} ms "
        f"(p99), {gone['max_ms']} ms (max), 60 streams and 60 whole requests leaving at once, "
        f"{gone['left']} in all",
        f"- open descriptors before and after 600 aborted streams: {gone['descriptors_before']} "
        f"and {gone['descriptors_after']}",
        f"- start to ready: {start['median_s']} s (median of {ROUNDS}), {start['max_s']} s (worst)",
        f"- memory: {start['memory_idle_mb']} MB idle, {gone['memory_peak_mb']} MB peak with 600 "
        "streams",
        "",
        f"Machine: {report['machine']['cores']} cores of {report['machine']['cpu']}, "
        f"Python {report['machine']['python']}. {report['date']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    raise_limit()
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "start": start_time(),
        "hang_up": hang_ups(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "figures.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
