"""Simulated runs of the whole gateway. Exits with 1 when an invariant is violated.

--seed N replays one run and prints what happened, and --seeds A..B plays many; --planted shows
after how many runs each of a number of planted bugs is found, and --bug NAME replays with one.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext

from tests.sim.campaign import campaign, find_all
from tests.sim.invariants import violations
from tests.sim.planted import PLANTED
from tests.sim.world import simulate


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay this one, and print its history")
    what.add_argument("--seeds", type=_span, metavar="A..B", help="play these, B not included")
    what.add_argument("--planted", action="store_true", help="look for the planted bugs")
    parser.add_argument("--bug", choices=sorted(PLANTED), help="with --seed: plant this bug")
    parser.add_argument("--most", type=int, default=200, help="with --planted: runs for each bug")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    asked = parser.parse_args()
    if asked.planted:
        sys.exit(_planted(asked.most, asked.jobs))
    if asked.seeds is not None:
        summary = campaign(asked.seeds, asked.jobs, tell=lambda line: _say(line))
        _say(str(summary))
        sys.exit(1 if summary.failed else 0)
    sys.exit(_replay(asked.seed, asked.bug))


def _replay(seed: int, bug: str | None) -> int:
    with PLANTED[bug].planted() if bug else nullcontext():
        run = simulate(seed)
    for line in run.history.lines():
        _say(line)
    found = violations(run)
    _say(f"\n{len(found)} violations; history {run.history.digest()[:16]}")
    for said in found:
        _say(said)
    return 1 if found else 0


def _planted(most: int, jobs: int) -> int:
    found = find_all(most, jobs)
    for name, result in found.items():
        seen = f"run {result[0]:>4}: {result[1][:110]}" if result else f"not in {most} runs"
        _say(f"{name:<28} {PLANTED[name].what}\n{'':<28} {seen}")
    missed = [name for name, result in found.items() if result is None]
    _say(f"\n{len(found) - len(missed)} of {len(found)} found")
    return 1 if missed else 0


def _span(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last))


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # a program's output


if __name__ == "__main__":
    main()
