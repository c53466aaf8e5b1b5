"""Many runs, in several processes: progress while they go, and what was found in the end."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import attrs

from tests.sim.clients import Fate
from tests.sim.invariants import violations
from tests.sim.planted import PLANTED
from tests.sim.world import Run, simulate

_BATCH = 10  # runs that a process is given at once
_COLLECT_EVERY = 20  # runs: the garbage collector would take a sixth of the time
_HANGS = 120.0  # seconds of real time after which a process says where it is, and gives up


@attrs.frozen(kw_only=True)
class Result:
    """What is kept of a run."""

    seed: int
    violations: tuple[str, ...]
    fates: Counter[str]
    jobs: int
    seconds: float


@attrs.define(eq=False)
class Summary:
    """What is kept of many."""

    runs: int = 0
    jobs: int = 0
    virtual: float = 0.0
    fates: Counter[str] = attrs.field(factory=Counter)
    failed: list[Result] = attrs.field(factory=list)

    def add(self, result: Result) -> None:
        self.runs += 1
        self.jobs += result.jobs
        self.virtual += result.seconds
        self.fates += result.fates
        if result.violations:
            self.failed.append(result)

    def __str__(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in self.fates.most_common())
        lines = [
            f"{self.runs} runs, {self.virtual / 3600:.1f} virtual hours",
            f"{self.fates.total()} requests ({fates}), {self.jobs} jobs at engines",
            f"{len(self.failed)} runs with violations",
        ]
        for result in self.failed[:20]:
            lines.append(f"  python -m tests.sim --seed {result.seed}")
            lines += [f"    {said[:300]}" for said in result.violations[:3]]
        return "\n".join(lines)


def judge(seed: int) -> Result:
    """Play a run and hold it against all invariants."""
    return result_of(simulate(seed))


def result_of(run: Run) -> Result:
    fates = Counter(seen.fate.value for seen in run.seen if isinstance(seen.fate, Fate))
    return Result(
        seed=run.scenario.seed,
        violations=tuple(violations(run)),
        fates=fates,
        jobs=len(run.fleet.jobs),
        seconds=run.stopped_at or 0.0,
    )


def judge_all(seeds: Iterable[int]) -> list[Result]:
    """One after the other, in this process."""
    results = []
    gc.disable()
    try:
        for number, seed in enumerate(seeds):
            faulthandler.dump_traceback_later(_HANGS, exit=True)
            results.append(judge(seed))
            if number % _COLLECT_EVERY == 0:
                gc.collect()
    finally:
        faulthandler.cancel_dump_traceback_later()
        gc.enable()
    return results


def campaign(seeds: Sequence[int], jobs: int, tell: Callable[[str], object]) -> Summary:
    """Play them all in *jobs* processes; *tell* is told how far it is."""
    summary, began, told = Summary(), time.monotonic(), time.monotonic()
    for result in _results(seeds, jobs):
        summary.add(result)
        if result.violations:
            tell(f"seed {result.seed}: {result.violations[0][:300]}")
        if time.monotonic() - told >= 10.0:
            told = time.monotonic()
            pace = summary.runs / (told - began)
            left = (len(seeds) - summary.runs) / pace
            tell(f"{summary.runs} of {len(seeds)}, {pace:.0f} a second, {left:.0f} s to go")
    return summary


def _results(seeds: Sequence[int], jobs: int) -> Iterator[Result]:
    batches = [seeds[at : at + _BATCH] for at in range(0, len(seeds), _BATCH)]
    if jobs == 1:
        for batch in batches:
            yield from judge_all(batch)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for results in pool.imap_unordered(judge_all, batches):
            yield from results


def find(name: str, most: int) -> tuple[int, str] | None:
    """After how many runs a planted bug shows, and as what; ``None`` if it does not."""
    with PLANTED[name].planted():
        for seed in range(most):
            if found := judge(seed).violations:
                return seed + 1, found[0]
    return None


def find_all(most: int, jobs: int) -> dict[str, tuple[int, str] | None]:
    """The same for every planted bug."""
    look = partial(find, most=most)
    if jobs == 1:
        return {name: look(name) for name in PLANTED}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return dict(zip(PLANTED, pool.map(look, PLANTED, chunksize=1), strict=True))
