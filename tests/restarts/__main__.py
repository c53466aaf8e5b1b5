"""`python -m tests.restarts --reloads 100 --restarts 20`: what is lost, if anything."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from tests.restarts.program import hand_over_often, reload_often, restart_often, roll_often


async def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.restarts")
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=20, help="with a socket that stays")
    parser.add_argument("--handovers", type=int, default=20, help="from process to process")
    parser.add_argument("--rolling", type=int, default=20, help="worker by worker")
    parser.add_argument("--workers", type=int, default=4, help="that are replaced one by one")
    parser.add_argument("--each", type=int, default=1, help="workers where all restart or reload")
    asked = parser.parse_args()
    clean = True
    for name, run, times in (
        ("reloads", partial(reload_often, workers=asked.each), asked.reloads),
        ("restarts", partial(restart_often, workers=asked.each), asked.restarts),
        ("hand-overs", hand_over_often, asked.handovers),
        ("rolling restarts", partial(roll_often, workers=asked.workers), asked.rolling),
    ):
        if times:
            with tempfile.TemporaryDirectory() as directory:
                result = await run(Path(directory), times)
            tasks = f"; tasks {result.tasks[0]} -> {result.tasks[1]}" if result.tasks[0] else ""
            sys.stdout.write(
                f"{times} {name} in {result.seconds:.1f} s: {result.tally}; "
                f"executed twice: {result.twice}{tasks}\n"
            )
            sys.stdout.flush()
            clean &= result.is_clean
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(trio.run(main))
