"""The garbage collector looks at everything only now and then."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys
from citadel_gateway.io.heap import keep_collections_short

if sys.argv[1] == "short":
    keep_collections_short()
full = []
gc.callbacks.append(lambda phase, info: full.append(phase) if info["generation"] == 2 else None)
streams = [[[n]] for n in range(60_000)]  # what many open streams would keep
print(full.count("stop"))
cycle = []
cycle.append(cycle)
del cycle
keep = [[] for _ in range(6_000)]
print(gc.get_stats()[0]["collected"] > 0)
"""


def full_collections(how: str) -> int:
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True, timeout=30
    )
    count, collected = said.stdout.split()
    assert collected == "True"  # young garbage goes all the same
    return int(count)


def test_many_streams_that_open_at_once_are_not_looked_at_again_and_again() -> None:
    assert full_collections("as ever") > 0
    assert full_collections("short") == 0
