"""The figures that the README quotes, measured in one run: CPU, hang-ups, start, memory.

    python -m bench.figures            # about two minutes; writes bench/results/figures.{json,md}

CPU time is what the measured process itself used (/proc/PID/stat), divided by the requests that
the driver got answered.  Gateway and rival take turns in the same run, so that a noisy machine is
noisy for both; quoted are medians over the rounds, and their ratio.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
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

ENGINE, HANG_UP_ENGINE, GATEWAY, RIVAL, METRICS = 11500, 11501, 8100, 8101, 9190
ROUNDS, SECONDS = 5, 4
RESULTS = Path(__file__).parent / "results"

CONFIG = """
service: {{host: 127.0.0.1, port: {port}}}
models:
  bench: {{endpoint: "http://127.0.0.1:{engine}", max_concurrent: 5000}}
performance:
  {{rate_limit_rps: 1000000, client_rate_limit_rps: 1000000, max_concurrent_requests: 5000}}
monitoring: {{prometheus_port: {metrics}}}
load_balancer: {{health_check_interval: 5}}
"""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int, key: str = "VmRSS") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key):
            return round(int(line.split()[1]) / 1024, 1)
    raise LookupError(key)


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()
    while time.monotonic() - began < 20 and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return time.monotonic() - began
        except (urllib.error.URLError, OSError):
            time.sleep(0.01)
    raise RuntimeError(f"nothing became ready on port {port}")


@contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def gateway_command(folder: str, engine: int) -> tuple[str, ...]:
    config = Path(folder) / "gateway.yaml"
    config.write_text(CONFIG.format(port=GATEWAY, engine=engine, metrics=METRICS))
    return python("-m", "citadel_gateway", "serve", "--config", str(config))


def load(what: str, port: int, connections: int) -> dict[str, Any]:
    command = python(
        "-m", "bench.load", what, "--port", str(port),
        "--connections", str(connections), "--seconds", str(SECONDS),
    )  # fmt: skip
    report: dict[str, Any] = json.loads(subprocess.check_output(command))
    return report


def cost(what: str, pid: int, port: int, connections: int) -> dict[str, Any]:
    before = cpu_seconds(pid)
    report = load(what, port, connections)
    used = cpu_seconds(pid) - before
    units = report["requests"] if what == "whole" else report["chunks"]
    report["cpu_us"] = round(used / units * 1e6, 1)
    return report


def compare(folder: str) -> dict[str, Any]:
    """CPU of gateway and rival for whole requests and for streams, in turns."""
    found: dict[str, Any] = {}
    with (
        running(*python("-m", "bench.engine", "--port", str(ENGINE))),
        running(*gateway_command(folder, ENGINE)) as ours,
        running(
            *python(
                "-m", "bench.plain_proxy", "--port", str(RIVAL),
                "--upstream", f"http://127.0.0.1:{ENGINE}",
            )
        ) as rival,
    ):  # fmt: skip
        wait_until_ready(GATEWAY, ours)
        wait_until_ready(RIVAL, rival)
        for what, connections in (("whole", 1), ("whole", 16), ("whole", 64), ("streams", 100)):
            rounds = [
                (
                    cost(what, ours.pid, GATEWAY, connections),
                    cost(what, rival.pid, RIVAL, connections),
                )
                for _ in range(ROUNDS)
            ]
            found[f"{what}, {connections} connections"] = summarise(rounds)
        found["memory_peak_mb"] = resident_mb(ours.pid, "VmHWM")
    return found


def summarise(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    ours = statistics.median(r[0]["cpu_us"] for r in rounds)
    rival = statistics.median(r[1]["cpu_us"] for r in rounds)
    return {
        "gateway_cpu_us": ours,
        "plain_proxy_cpu_us": rival,
        "ratio": round(ours / rival, 3),
        "gateway_p50_ms": statistics.median(r[0].get("p50_ms", 0) for r in rounds),
        "plain_proxy_p50_ms": statistics.median(r[1].get("p50_ms", 0) for r in rounds),
        "failed": sum(r[0]["failed"] for r in rounds),
    }


def hang_ups(folder: str) -> dict[str, Any]:
    with running(*gateway_command(folder, HANG_UP_ENGINE)) as ours:
        wait_until_alive(ours)
        watcher = subprocess.Popen(
            python(
                "-m", "bench.hang_up", "--port", str(GATEWAY),
                "--engine-port", str(HANG_UP_ENGINE), "--pid", str(ours.pid),
            ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until_ready(GATEWAY, ours)
        out, _ = watcher.communicate(b"go\n", timeout=120)
        report: dict[str, Any] = json.loads(out)
        report["memory_peak_mb"] = resident_mb(ours.pid, "VmHWM")
        return report


def wait_until_alive(process: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 20 and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{GATEWAY}/livez", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.01)
    raise RuntimeError("the gateway did not start")


def start_time(folder: str) -> dict[str, Any]:
    times = []
    with running(*python("-m", "bench.engine", "--port", str(ENGINE))):
        for _ in range(ROUNDS):
            with running(*gateway_command(folder, ENGINE)) as ours:
                times.append(wait_until_ready(GATEWAY, ours))
                idle = resident_mb(ours.pid)
    return {
        "median_s": round(statistics.median(times), 2),
        "max_s": round(max(times), 2),
        "memory_idle_mb": idle,
    }


def machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count(),
            "python": platform.python_version(), "system": platform.system()}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    lines = ["| load | gateway, CPU µs | plain proxy, CPU µs | ratio |", "|---|---|---|---|"]
    for name, row in report["cpu"].items():
        if isinstance(row, dict):
            lines.append(
                f"| {name} | {row['gateway_cpu_us']} | {row['plain_proxy_cpu_us']} "
                f"| {row['ratio']} |"
            )
    gone, start = report["hang_up"], report["start"]
    lines += [
        "",
        "Whole: CPU per request. Streams: CPU per chunk, 100 streams of 100 chunks at 20 a second.",
        "",
        f"- a hang-up is seen by the engine after {gone['p50_ms']} ms (p50), {gone['p99_ms']} ms "
        f"(p99), {gone['max_ms']} ms (max), 60 streams and 60 whole requests leaving at once, "
        f"{gone['left']} in all",
        f"- open descriptors before and after 600 aborted streams: {gone['descriptors_before']} "
        f"and {gone['descriptors_after']}",
        f"- start to ready: {start['median_s']} s (median of {ROUNDS}), {start['max_s']} s (worst)",
        f"- memory: {start['memory_idle_mb']} MB idle, {report['cpu']['memory_peak_mb']} MB peak "
        f"under the load above, {gone['memory_peak_mb']} MB peak with 600 streams",
        "",
        f"Machine: {report['machine']['cores']} cores of {report['machine']['cpu']}, "
        f"Python {report['machine']['python']}. {report['date']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    folder = tempfile.mkdtemp()
    try:
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "start": start_time(folder),
            "cpu": compare(folder),
            "hang_up": hang_ups(folder),
        }
    finally:
        shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "figures.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
