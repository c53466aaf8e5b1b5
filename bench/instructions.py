"""Instructions that the gateway's own process spends on a request and on a chunk, counted.

    python -m bench.instructions            # against bench/results/instructions.json
    python -m bench.instructions --accept   # what is counted becomes the new baseline

Time depends on who else uses the machine, a count hardly does, so a version that costs more shows
before it is slow.  valgrind runs the gateway; counting is off until it has started and is warm.
One connection, one request after another.  Each count is the difference between a long phase and
a short one, so that what happens once per phase cancels; what timers do meanwhile is counted in a
phase of rest and taken off.

Chunks are counted three times, and the middle one is taken: how many are read together is the
kernel's choice.

Exit codes: 0 fine, 1 a count is too far above its baseline (5 % for requests, 15 % for chunks),
2 nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs

from bench.load import connect, read, request
from bench.peers import KEY, Place, citadel_config, first_answer
from bench.processes import Process, free_ports, running

BASELINE = Path(__file__).parent / "results" / "instructions.json"
ALLOWED = {"per_request": 1.05, "per_chunk": 1.15}
WARM, FEW, MANY = 100, 100, 400  # whole requests
SHORT, LONG, PACE = 50, 650, 100  # chunks of a stream; slow enough to be read one by one
STREAMS = 3
REST = 3.0  # seconds


@attrs.frozen
class Phase:
    instructions: int
    seconds: float


@attrs.define
class Counter:
    """Counts phases of a gateway that runs under callgrind."""

    process: Process
    out: Path
    dumps: int = 0

    def control(self, *what: str) -> None:
        subprocess.run(
            ["callgrind_control", *what, str(self.process.pid)],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip

    def dump(self) -> int:
        """Instructions since the last one."""
        self.control("--dump")
        self.dumps += 1
        text = self.out.with_name(f"{self.out.name}.{self.dumps}").read_text()
        found = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        return int(found.group(1)) if found else 0

    def phase(self, act: Callable[[], None]) -> Phase:
        began = time.monotonic()
        act()
        time.sleep(0.3)  # what comes after the answer belongs to it: log, metrics
        return Phase(self.dump(), time.monotonic() - began)


def ask(port: int, raw: bytes, times: int) -> None:
    """On one connection, one after another."""
    client = connect(port)
    for _ in range(times):
        client.complete = False
        client.sock.sendall(raw)
        while not client.complete:
            if not read(client):
                raise RuntimeError("the gateway has hung up")
        if not client.good:
            raise RuntimeError(f"the gateway answers {client.parser.get_status_code()}")
    client.sock.close()


def per_unit(short: Phase, long: Phase, units: int, rest: Phase) -> int:
    extra = rest.instructions / rest.seconds * (long.seconds - short.seconds)
    return round((long.instructions - short.instructions - extra) / units)


def count(engine: int, folder: Path) -> dict[str, int]:
    port, metrics = free_ports(2)
    place = Place(folder=folder, port=port, metrics_port=metrics, engine=engine)
    file = place.write("gateway.yaml", citadel_config(place, interval=3600))
    out = folder / "callgrind"
    command = (
        "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--instr-atstart=no",
        sys.executable, "-m", "citadel_gateway", "serve", "--config", file,
    )  # fmt: skip

    whole = request(streamed=False, key=KEY)

    def stream(chunks: int) -> bytes:
        return request(streamed=True, chunks=chunks, pace=PACE, key=KEY)

    with running(command, env={"PYTHONHASHSEED": "0"}, log=folder / "output.log") as process:
        first_answer(port, process)
        ask(port, whole, WARM)
        ask(port, stream(SHORT), 1)
        counter = Counter(process, out)
        counter.control("--instr=on")
        ask(port, whole, 10)
        counter.dump()
        rest = counter.phase(lambda: time.sleep(REST))
        few = counter.phase(lambda: ask(port, whole, FEW))
        many = counter.phase(lambda: ask(port, whole, MANY))
        streams = [
            (
                counter.phase(lambda: ask(port, stream(SHORT), 1)),
                counter.phase(lambda: ask(port, stream(LONG), 1)),
            )
            for _ in range(STREAMS)
        ]
    return {
        "per_request": per_unit(few, many, MANY - FEW, rest),
        "per_chunk": statistics.median_low(
            per_unit(short, long, LONG - SHORT, rest) for short, long in streams
        ),
        "per_second_at_rest": round(rest.instructions / rest.seconds),
    }


def surroundings() -> dict[str, str]:
    """What a count depends on besides the gateway."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "trio": version("trio"),
        "httptools": version("httptools"),
    }


def verdicts(found: dict[str, int], baseline: dict[str, Any]) -> tuple[list[str], bool]:
    """A line for each count, and whether all are within what is allowed."""
    lines, good = [], True
    for what, allowed in ALLOWED.items():
        now, then = found[what], baseline[what]
        fine = now <= then * allowed
        good = good and fine
        lines.append(
            f"{what.replace('_', ' ')}: {now:,} instructions, {now / then - 1:+.1%} against "
            f"{then:,}{'' if fine else f': MORE than {allowed - 1:.0%} above'}"
        )
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accept", action="store_true", help="store what is counted")
    accept = parser.parse_args().accept
    if not shutil.which("valgrind"):
        print("no valgrind here; on Debian: apt-get install valgrind", file=sys.stderr)
        return 2
    (engine,) = free_ports(1, 20500)
    with (
        tempfile.TemporaryDirectory() as folder,
        running((sys.executable, "-m", "bench.engine", "--port", str(engine))),
    ):
        found = count(engine, Path(folder))
    print(json.dumps(found))
    if accept:
        stored = {**found, **surroundings(), "date": time.strftime("%Y-%m-%d")}
        BASELINE.write_text(json.dumps(stored, indent=2) + "\n")
        print(f"stored in bench/results/{BASELINE.name}")
        return 0
    if not BASELINE.exists():
        print("no baseline yet: run with --accept", file=sys.stderr)
        return 2
    baseline = json.loads(BASELINE.read_text())
    if differs := [k for k, v in surroundings().items() if baseline.get(k) != v]:
        print(f"not comparable, other {', '.join(differs)}: run with --accept", file=sys.stderr)
        return 2
    lines, good = verdicts(found, baseline)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
