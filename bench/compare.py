"""Five gateways side by side, in front of one fast engine, on one machine, in one run.

    python -m bench.compare            # ROUNDS=n for other than three rounds

In each round every gateway is started afresh, and then they take turns: each load goes to one
after another, so that a noisy minute is noisy for all.  Writes ``bench/results/compare.json`` with
everything that was measured, ``compare.md`` with the tables, and the plots.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs

from bench import plots, report, scale
from bench.loads import LOADS, drive, load_for
from bench.peers import GATEWAYS, Gateway, Launch, Place, Unavailable, first_answer
from bench.processes import (
    Process,
    free_ports,
    machine,
    resident_mb,
    running,
    wait_until_quiet,
)
from citadel_gateway.io.descriptors import raise_limit

RESULTS = Path(__file__).parent / "results"
DIRECT = LOADS[0]  # what the engine is asked without a gateway, for the latency that one adds


@attrs.define
class Measured:
    """One gateway's share of the results; lists have an item for each round."""

    version: str = ""
    note: str = ""
    command: str = ""
    config: str = ""
    env: dict[str, str] = attrs.field(factory=dict)
    problem: str = ""
    idle_mb: list[float] = attrs.field(factory=list)
    own_loads: dict[str, dict[str, Any]] = attrs.field(factory=dict)  # where not as the others'
    loads: dict[str, list[dict[str, Any]]] = attrs.field(factory=dict)


@attrs.frozen
class Running:
    gateway: Gateway
    measured: Measured
    port: int
    process: Process


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def install(measured: dict[str, Measured]) -> dict[str, str]:
    """Name to program, of all that can be had here."""
    programs: dict[str, str] = {}
    for gateway in GATEWAYS:
        found = measured[gateway.name] = Measured(note=gateway.note)
        try:
            programs[gateway.name], found.version = gateway.install(gateway.requirement)
        except Unavailable as problem:
            found.problem = str(problem)
            say(f"{gateway.name}: {problem}")
    return programs


def record(measured: Measured, launch: Launch, place: Place, program: str) -> None:
    """Without the paths of this machine."""

    def general(text: str) -> str:
        folder, name = Path(program).parent, Path(program).name
        return text.replace(str(place.folder), "DIR").replace(program, name).replace(
            f"{folder}/", ""
        )  # fmt: skip

    measured.command = general(" ".join(launch.command))
    measured.config = general(launch.config)
    measured.env = dict(launch.env)


def start_all(
    programs: dict[str, str],
    measured: dict[str, Measured],
    engine: int,
    folder: Path,
    stack: contextlib.ExitStack,
) -> list[Running]:
    """All at once, then each until it has answered and is quiet."""
    starting: list[Running] = []
    ports = free_ports(2 * len(GATEWAYS))
    for gateway in GATEWAYS:
        found = measured[gateway.name]
        if gateway.name not in programs or found.problem:
            continue
        own = folder / gateway.name
        own.mkdir()
        place = Place(folder=own, port=ports.pop(), metrics_port=ports.pop(), engine=engine)
        program = programs[gateway.name]
        launch = gateway.launch(program, place)
        record(found, launch, place, program)
        process = stack.enter_context(
            running(launch.command, env=launch.env, log=own / "output.log")
        )
        starting.append(Running(gateway, found, place.port, process))
    started: list[Running] = []
    for one in starting:
        try:
            first_answer(one.port, one.process)
        except Unavailable as problem:
            last = (folder / one.gateway.name / "output.log").read_text("utf-8", "replace")
            one.measured.problem = str(problem)
            say(f"{one.gateway.name}: {problem}\n{last[-2000:]}")
            continue
        started.append(one)
    for one in started:
        wait_until_quiet(one.process.pid)
        one.measured.idle_mb.append(resident_mb(one.process.pid))
    return started


def one_round(started: list[Running], engine: int, direct: list[dict[str, Any]], turn: int) -> None:
    order = started[turn % len(started) :] + started[: turn % len(started)]
    direct.append(drive(DIRECT, engine))
    for load in LOADS:
        for one in order:
            own = load_for(load, slow=one.gateway.slow)
            if own is None or one.process.poll() is not None:
                continue
            if own is not load:
                one.measured.own_loads[load.name] = attrs.asdict(own)
            result = drive(own, one.port, one.process.pid)
            one.measured.loads.setdefault(load.name, []).append(result)
            wait_until_quiet(one.process.pid)  # connections have closed
        say(f"round {turn + 1}: {load.name}")


def compare(rounds: int) -> dict[str, Any]:
    measured: dict[str, Measured] = {}
    direct: list[dict[str, Any]] = []
    programs = install(measured)
    (engine,) = free_ports(1, 20500)
    with running((sys.executable, "-m", "bench.engine", "--port", str(engine))):
        for turn in range(rounds):
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                started = start_all(programs, measured, engine, Path(folder), stack)
                say(f"round {turn + 1}: {', '.join(one.gateway.name for one in started)} run")
                if not started:
                    raise SystemExit("not one gateway runs: see above")
                one_round(started, engine, direct, turn)
        say("many endpoints")
        many = scale.measure(engine, rounds)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "rounds": rounds,
        "loads": [attrs.asdict(load) for load in LOADS],
        "direct": direct,
        "gateways": {name: attrs.asdict(found) for name, found in measured.items()},
        "scale": many,
    }


def main() -> None:
    raise_limit()
    began = time.monotonic()
    found = compare(int(os.environ.get("ROUNDS", "3")))
    found["took_s"] = round(time.monotonic() - began)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compare.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "compare.md").write_text(report.markdown(found))
    plots.write(found, RESULTS)
    print(report.markdown(found))


if __name__ == "__main__":
    main()
