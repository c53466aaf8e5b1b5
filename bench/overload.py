"""What is left of a gateway that is asked for ten times what its engine can do.

    python -m bench.overload           # six minutes; writes bench/results/overload.{json,md}

An engine of known capacity behind a real gateway process, and an open-loop driver
(:mod:`bench.open_loop`) in a third one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs

from bench.open_loop import quantiles
from bench.peers import KEY
from bench.processes import (
    beside,
    cpu_seconds,
    free_ports,
    machine,
    resident_mb,
    running,
    starved_seconds,
)

RESULTS = Path(__file__).parent / "results"
CHUNKS, PACE = 20, 10
"""Of each stream, and a second: it takes two seconds of a slot."""

STEPS = (0.5, 1.0, 2.0, 5.0, 10.0, 0.5)
"""Load that is offered, in capacities.  The last one shows that nothing is left of the others."""

PATIENCE = 5.0

CONFIG = """\
service: {{host: 127.0.0.1, port: {port}, workers: 1}}
models:
  bench: {{endpoint: "http://127.0.0.1:{engine}", max_concurrent: {slots}}}
performance: {{max_concurrent_requests: {slots}, rate_limiting_enabled: false}}
monitoring: {{prometheus_port: {metrics}}}
security:
  api_keys: [{{id: bench, sha256: {sha256}}}]
"""


@attrs.frozen
class Gateway:
    port: int
    metrics: int
    pid: int
    log: Path
    config: str
    slots: int

    @property
    def capacity(self) -> float:
        """Streams a second."""
        return self.slots * PACE / CHUNKS


@contextmanager
def gateway(slots: int) -> Iterator[Gateway]:
    """A gateway and its engine, both processes; ready when entered."""
    with tempfile.TemporaryDirectory() as folder:
        port, metrics, engine = free_ports(3)
        config = CONFIG.format(
            port=port,
            engine=engine,
            metrics=metrics,
            slots=slots,
            sha256=hashlib.sha256(KEY.encode()).hexdigest(),
        )
        file, log = Path(folder, "gateway.yaml"), Path(folder, "gateway.log")
        file.write_text(config)
        serve = (sys.executable, "-m", "citadel_gateway", "serve", "--config", str(file))
        with (
            running((sys.executable, "-m", "bench.engine", "--port", str(engine))),
            running(serve, log=log) as process,
        ):
            wait_until_ready(metrics)
            yield Gateway(port, metrics, process.pid, log, config, slots)


def wait_until_ready(port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the gateway does not become ready")


@attrs.define
class Watcher:
    """Looks at the gateway from outside while it is under load: memory, and whether it answers."""

    gateway: Gateway
    peak_mb: float = 0.0
    probes_ms: list[float] = attrs.field(factory=list)
    _over: threading.Event = attrs.field(factory=threading.Event)

    def watch(self) -> None:
        url = f"http://127.0.0.1:{self.gateway.metrics}/livez"
        while not self._over.wait(0.1):
            began = time.monotonic()
            with urllib.request.urlopen(url, timeout=5) as answer:
                answer.read()
            self.probes_ms.append((time.monotonic() - began) * 1000)
            self.peak_mb = max(self.peak_mb, resident_mb(self.gateway.pid))

    def watching(self) -> AbstractContextManager[None]:
        return beside(self.watch, self._over)


def step(under_test: Gateway, load: float, seconds: float, prompt: int) -> dict[str, Any]:
    """One load on a gateway that runs already, and what became of it."""
    read = under_test.log.stat().st_size
    watcher = Watcher(under_test)
    cpu, starved = cpu_seconds(under_test.pid), starved_seconds(under_test.pid)
    command = (
        sys.executable, "-m", "bench.open_loop", "--port", str(under_test.port), "--key", KEY,
        "--rate", str(load * under_test.capacity), "--seconds", str(seconds),
        "--patience", str(PATIENCE), "--chunks", str(CHUNKS), "--pace", str(PACE),
        "--prompt", str(prompt),
    )  # fmt: skip
    with watcher.watching():
        said = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 60)
    report: dict[str, Any] = json.loads(said.stdout)
    lines = under_test.log.read_bytes()[read:].splitlines()
    refusals = [
        line["duration_ms"]
        for line in map(json.loads, lines)
        if line.get("outcome") in {"queue_full", "queue_timeout"} and "queue_ms" not in line
    ]
    return report | {
        "load": load,
        "refused_at_once_in_gateway_ms": quantiles(refusals),
        "probes_ms": quantiles(watcher.probes_ms),
        "peak_mb": watcher.peak_mb,
        "cpu_share": round((cpu_seconds(under_test.pid) - cpu) / seconds, 3),
        "starved_share": round((starved_seconds(under_test.pid) - starved) / seconds, 3),
    }


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the same load, several times over: the round whose refusals are in the middle."""

    def of(each: dict[str, Any]) -> float:
        wire: dict[str, float] | None = each["refused_at_once_on_the_wire_ms"]
        return -float(each["goodput"]) if wire is None else wire["p99"]

    return sorted(rounds, key=of)[len(rounds) // 2]


def table(steps: list[dict[str, Any]]) -> str:
    def pair(found: dict[str, float] | None) -> str:
        return "-" if found is None else f"{found['p50']:.1f} / {found['p99']:.1f}"

    peak = max(each["goodput"] for each in steps)
    rows = [
        "| offered | goodput | of the peak | refused at once | p50 / p99, client"
        " | p50 / p99, wire | p50 / p99, gateway | refused late | first token p50 / p99 | broken"
        " | /livez p50 / p99 | CPU | starved | memory |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in steps:
        at_once = sum(
            n for answer, n in each["answers"].items() if answer.startswith(("429", "503"))
        )
        rows.append(
            f"| {each['load']:g}x, {each['offered']:.0f}/s | {each['goodput']:.1f}/s"
            f" | {each['goodput'] / peak:.0%} | {at_once - each['refused_late']}"
            f" | {pair(each['refused_at_once_ms'])} ms"
            f" | {pair(each['refused_at_once_on_the_wire_ms'])} ms"
            f" | {pair(each['refused_at_once_in_gateway_ms'])} ms"
            f" | {each['refused_late']} | {pair(each['first_token_s'])} s"
            f" | {each['broken']} | {pair(each['probes_ms'])} ms | {each['cpu_share']:.0%}"
            f" | {each['starved_share']:.0%}"
            f" | {each['peak_mb']:.0f} MB |"
        )
    return "\n".join(rows) + "\n"


def page(report: dict[str, Any], found: str) -> str:
    of = report["machine"]
    return f"""\
# Overload

`python -m bench.overload`: one gateway process, an engine of {report["capacity"]:g} streams
a second (two seconds each), an open-loop driver that asks for more.
{of["cores"]} cores of an {of["cpu"]}, shared with other work, Python {of["python"]}.

{found}
- *offered*: in capacities, one load after the other on the same process; the last shows that
  nothing is left of the others.  All loads {len(report["rounds"])} times over, each row the round
  whose refusals on the wire were in the middle at p99
- *goodput*: streams that ended whole, with their first token within {PATIENCE:g} s of the moment at
  which they were to be asked for
- *refused at once*: 503 without having waited in the queue, and how long that took: at the client,
  from the moment at which it was to ask until it had read the answer (the driver's own waits
  for a core included); on the wire, from sending, or beginning to connect, until the answer was in
  the client's socket, by the kernel's time stamp (the gateway's waits for a core included); and in
  the gateway, by its access log
- */livez*: on the metrics listener, ten times a second
- *starved*: the share of the time in which the gateway could have run and the machine's other
  work had the cores; where that is near *CPU*, clients' times are the machine's, not the gateway's

```yaml
{report["config"]}```
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--loads", type=float, nargs="*", default=STEPS, help="in capacities")
    parser.add_argument("--slots", type=int, default=128, help="of the engine, two seconds each")
    parser.add_argument("--prompt", type=int, default=0, help="at least so many bytes of it")
    parser.add_argument("--rounds", type=int, default=3, help="of all loads; the middle one counts")
    parser.add_argument("--no-write", action="store_true", help="print it only")
    a = parser.parse_args()
    with gateway(a.slots) as under_test:
        rounds = [
            [step(under_test, load, a.seconds, a.prompt) for load in a.loads]
            for _ in range(a.rounds)
        ]
        config = under_test.config
    steps = [middle(list(same)) for same in zip(*rounds, strict=True)]
    found = table(steps)
    print(found)
    if a.no_write:
        print(json.dumps(steps, indent=1))
        return
    report = {
        "machine": machine(),
        "capacity": under_test.capacity,
        "config": config,
        "steps": steps,
        "rounds": rounds,
    }
    (RESULTS / "overload.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "overload.md").write_text(page(report, found))


if __name__ == "__main__":
    main()
