"""`python -m tests.many`: what many processes promise together, against clients' ledgers."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from tests.many import caps, deaths, limits, outages, probers, soak
from tests.many.fleet import Shape
from tests.many.report import Finding, table
from tests.support.redis_server import RedisServer, running_redis

Play = Callable[[Path, RedisServer], Awaitable[list[Finding]]]

ONE_HOST = [Shape(1), Shape(2), Shape(4), Shape(8)]
HOSTS = [Shape(1, gateways=3), Shape(2, gateways=3)]


def plays(seconds: float, seed: int | None) -> dict[str, list[Play]]:
    """By name; each is played with a Redis of its own."""
    some = [Shape(4), Shape(2, gateways=3)]
    return {
        "limits": [
            *(partial(limits.one_for_all, shape=s, seconds=seconds) for s in ONE_HOST + HOSTS),
            *(partial(limits.one_for_each_key, shape=s, seconds=seconds) for s in some),
            *(partial(limits.keys_within_the_whole, shape=s, seconds=seconds) for s in some),
        ],
        "caps": [partial(caps.one_for_all, shape=s, seconds=seconds) for s in ONE_HOST + HOSTS],
        "outages": [
            partial(outages.outage, what=what, shape=HOSTS[1], seconds=seconds / 2)
            for what in ("killed", "paused", "emptied")
        ],
        "probers": [
            partial(probers.moves, shape=s, seconds=seconds / 2) for s in ONE_HOST[2:] + HOSTS
        ],
        "deaths": [partial(deaths.one_after_the_other, seconds=6 * seconds, pause=1.0, clients=60)],
        **{
            name: [partial(soak.run, shape=shape, seconds=seconds, seed=seed)]
            for name, shape in (("soak-lmdb", Shape(4)), ("soak-redis", Shape(2, gateways=2)))
        },
    }


async def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.many")
    parser.add_argument("--only", nargs="+", help="scenes whose names begin so")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each scene")
    parser.add_argument("--seed", type=int, help="of what is broken in a soak")
    asked = parser.parse_args()
    findings: list[Finding] = []
    for name, scenes in plays(asked.seconds, asked.seed).items():
        for play in scenes if name.startswith(tuple(asked.only or [name])) else ():
            with tempfile.TemporaryDirectory() as directory:
                folder = Path(directory)
                with running_redis(folder / "redis") as redis:
                    found = await play(folder, redis)
            for each in found:
                sys.stderr.write(f"{each}\n")
            findings += found
    sys.stdout.write(table(findings))
    return 0 if all(each.is_kept for each in findings) else 1


if __name__ == "__main__":
    sys.exit(trio.run(main))
