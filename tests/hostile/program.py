"""All phases, in the sizes that the long and the short run use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import attrs
import trio

from tests.hostile import phases_bytes, phases_crowding, phases_leaving
from tests.hostile.report import Report
from tests.hostile.siege import GatewayDiedError, Siege, siege

Play = Callable[[Siege], Awaitable[None]]


@attrs.frozen(kw_only=True)
class Size:
    """How much of everything; `every` n-th place or case is tried."""

    mutants: int
    first: int = 0  # the number of the first mutant
    cases_every: int = 1
    pipeline: int = 300
    encodings_every: int = 1
    cuts_every: int = 1
    departures_every: int = 1
    silent_rounds: int = 8
    crowds: int = 9
    flood: float = 1.0
    readers: int = 16


LONG = Size(mutants=5000)
SHORT = Size(
    mutants=250, pipeline=18, encodings_every=20, cuts_every=40, departures_every=29,
    silent_rounds=1, crowds=3, flood=0.2, readers=4,
)  # fmt: skip


def phases(size: Size) -> dict[str, Play]:
    """By name, in the order in which they are played. `stop` comes last: it ends the gateway."""
    b, leaving, crowding = phases_bytes, phases_leaving, phases_crowding
    return {
        "idle": _idle,
        "corpus": partial(b.play_corpus, every=size.cases_every),
        "pipelines": partial(b.play_pipelines, most=size.pipeline),
        "closings": b.play_closings,
        "mutants": partial(b.play_mutants, cases=size.mutants, first=size.first),
        "encodings": partial(b.play_encodings, every=size.encodings_every),
        "deliveries": partial(b.play_deliveries, every=size.cuts_every),
        "departures": partial(leaving.play_departures, every=size.departures_every),
        "silent engines": partial(leaving.play_silent_engines, rounds=size.silent_rounds),
        "crowds": partial(leaving.play_crowds, rounds=size.crowds),
        "floods": partial(crowding.play_floods, size=size.flood),
        "slowness": partial(crowding.play_slowness, readers=size.readers),
        "stop": crowding.play_stop,
    }


async def besiege(
    names: list[str], size: Size, *, seed: int, src: str | None = None, aloud: bool = False
) -> Report:
    """Play the phases *names* against one gateway; the report says what was found."""
    report = Report(seed, aloud=aloud)
    plays = phases(size)
    async with siege(seed=seed, src=src, report=report) as found:
        try:
            for name in plays:
                if name not in names:
                    continue
                if name == "stop":
                    report.phase = name
                    await plays[name](found)
                else:
                    await found.phase(name, plays[name])
        except GatewayDiedError:
            report.note("nothing more can be tried")
    return report


async def _idle(siege: Siege) -> None:
    """Nothing hostile, for the latency that the rest is compared with."""
    await trio.sleep(1)
