"""The failure scenarios, against this gateway and against others.

LiteLLM and sglang-router are installed into environments of their own (`PEERS=DIR`; by default
`.peers/`), like those of `make bench`.  Exits with 1 if this gateway fails one, or is merely safe.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import bench
from bench.processes import machine

from tests.scenarios.gateways import CITADEL, DIRECT, LITELLM, SGLANG
from tests.scenarios.judging import Grade
from tests.scenarios.report import as_json, markdown, plain
from tests.scenarios.runner import PACE, Card, run
from tests.scenarios.scenario import SCENARIOS

_RESULTS = Path(bench.__file__).parent / "results"
_ALL = (CITADEL, LITELLM, SGLANG, DIRECT)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.scenarios",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", action="store_true", help="the other gateways, too")
    parser.add_argument(
        "--gateway", action="append", choices=[g.name for g in _ALL], help="this one; repeatable"
    )
    parser.add_argument(
        "--only", action="append", choices=list(SCENARIOS), metavar="ID", help="repeatable"
    )
    parser.add_argument(
        "--pace", type=float, default=PACE,
        help="real seconds for each of the benchmark's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for configurations and logs")
    parser.add_argument("--write", action="store_true", help="write bench/results/scenarios.*")
    asked = parser.parse_args()
    wanted = asked.gateway or [g.name for g in (_ALL if asked.peers else (CITADEL,))]
    cards = []
    for gateway in _ALL:
        if gateway.name in wanted:
            card = run(gateway, only=asked.only or (), pace=asked.pace, folder=asked.keep)
            print(plain(card), flush=True)  # noqa: T201  # a program's output
            cards.append(card)
    if asked.write:
        _write(cards, asked.pace)
    sys.exit(any(_has_failed(card) for card in cards if card.gateway is CITADEL))


def _has_failed(card: Card) -> bool:
    return bool(card.problem) or card.count(Grade.FAIL) + card.count(Grade.SAFE) > 0


def _write(cards: Sequence[Card], pace: float) -> None:
    date, where = time.strftime("%Y-%m-%d"), machine()
    _RESULTS.mkdir(exist_ok=True)
    text = markdown(cards, pace=pace, date=date, machine=where)
    (_RESULTS / "scenarios.md").write_text(text, "utf-8")
    data = as_json(cards, pace=pace, date=date, machine=where)
    (_RESULTS / "scenarios.json").write_text(data, "utf-8")


if __name__ == "__main__":
    main()
