"""The long siege of a gateway process. Exits with 1 on any violation.

A mutant is repeated by the seed of its run and its number:
--seed 7 --phase mutants --first 1642 --cases 1
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from functools import partial

import attrs
import trio

from tests.hostile.process import environment
from tests.hostile.program import LONG, SHORT, besiege, phases


def main() -> None:
    names = list(phases(LONG))
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="repeats a run; by default, a random one")
    parser.add_argument("--cases", type=int, help="mutated requests (default: 5000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--phase", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--short", action="store_true", help="as little as the test suite does")
    parser.add_argument("--src", help="a checkout, or its `src`, whose gateway is to be attacked")
    asked = parser.parse_args()
    size = attrs.evolve(SHORT if asked.short else LONG, first=asked.first)
    if asked.cases is not None:
        size = attrs.evolve(size, mutants=asked.cases)
    seed = random.randrange(10**6) if asked.seed is None else asked.seed
    print(f"seed {seed}, against {_where(asked.src)}", flush=True)  # noqa: T201  # a program's output
    play = partial(besiege, asked.phase or names, size, seed=seed, src=asked.src, aloud=True)
    report = trio.run(play)
    print(f"\n{report.summary}")  # noqa: T201
    sys.exit(1 if report.violations else 0)


def _where(src: str | None) -> str:
    """The package that the gateway's process will import."""
    code = "import citadel_gateway; print(citadel_gateway.__file__)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment(src), capture_output=True, text=True, check=True)
    return run.stdout.strip()


if __name__ == "__main__":
    main()
