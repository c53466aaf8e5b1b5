"""What a soak has found, held against what is promised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tests.many.callers import accounts
from tests.many.hand import GIVEN_UP, KEY, Host
from tests.many.ledger import Told, excess, fill
from tests.many.report import Finding
from tests.many.turns import BUCKETS, CAP, HEALS, STEADY_RATE, WAVE_BURST, WAVE_RATE, Soak
from tests.support.ledger import total

_LEAVES = 1.0  # seconds in which an engine has to hear of a departure
_SETTLES = 0.5  # seconds in which all tell a store that was emptied what they have spent
_FINISHES = 1.0  # seconds that an answer takes
LEASE = 3.0  # the default
LEAST = 0.97
_THERE = 0.25  # of the time, at least, in which limits are looked at closely
_DIED = "a worker died"
_DEATHS = (_DIED, GIVEN_UP)


async def judged(
    soak: Soak, hosts: list[Host], seats: list[str], full: float, least: float
) -> list[Finding]:
    hand = soak.hand
    scene = f"{soak.shape}: soak, seed {soak.seed}, {len(hand.done)} faults"
    pages = [await gateway.metrics(KEY) for gateway in hand.several]
    return [
        *_of_clients(scene, soak, hosts),
        *_of_limits(scene, soak, least),
        _of_caps(scene, soak),
        _of_counters(scene, soak, pages),
        Finding(
            scene,
            f"all is whole again within {HEALS:g} s, workers that start included",
            f"{max(soak.healed):.1f} s at the most" + _some(soak.slow + soak.hand.stuck),
            not (soak.slow or soak.hand.stuck),
        ),
        Finding(
            scene,
            f"no seat is left, and all of the caps can be used within {LEASE:g} s",
            f"after {full:.2f} s" + _some(seats),
            not seats and full <= LEASE,
        ),
        *_of_growth(scene, soak),
    ]


def _of_clients(scene: str, soak: Soak, hosts: list[Host]) -> list[Finding]:
    callers = soak.callers
    runs = [run for host in hosts for run in host.engine.posts]
    wrong, latest = accounts(callers.requests.values(), runs, soak.hand.dark, _LEAVES)
    told = ", ".join(f"{n} {what}" for what, n in sorted(callers.outcomes().items()))
    left = callers.outcomes()["left"]
    return [
        Finding(
            scene,
            "each request has one end; cut are only those of a killed worker, streams fail only "
            "with a killed engine, and 502 get only those who meet two",
            told + _some(wrong),
            not wrong,
        ),
        Finding(
            scene,
            f"no engine works for {_LEAVES:g} s for a client who has left",
            f"{left} left, heard of after {latest * 1e3:.0f} ms at the most",
            left > 0 and latest <= _LEAVES,
        ),
    ]


def _of_limits(scene: str, soak: Soak, least: float) -> list[Finding]:
    others = (soak.shape.processes - 1) / soak.shape.processes
    quiet, whole, beyond = [], [], 0.0
    gone = _merged([*soak.hand.silent, *soak.hand.missed])
    calm_for = 1 - sum(end - start for start, end in gone) / (soak.turns[-1][1] - soak.turns[0][0])
    for key, rate, burst in BUCKETS:
        passed = soak.callers.of(key)
        for began, ended in soak.turns:
            silent = [
                (max(start, began), min(end, ended))
                for start, end in gone
                if start < ended and began < end
            ]
            # Some may be cut off while others are not.
            more = sum(others * (burst + rate * (s[1] - s[0])) for s in silent)
            over = excess(_within(passed, began, ended), rate, burst)
            whole.append(over)
            beyond = max(beyond, over - more)
            starts = [began, *(s[1] + _SETTLES for s in silent)]
            ends = [*(s[0] for s in silent), ended]
            quiet += [
                (excess(_within(passed, start, end), rate, burst), key, start, end)
                for start, end in zip(starts, ends, strict=True)
            ]
    over, key, start, end = max(quiet)
    # Where the store was too slow for a request, that is charged here and there.
    good = [calm for calm in soak.calms if not calm.misses]
    # The one bucket is empty when we begin to look, and the other one full.
    steady = [
        fill(_within(soak.callers.of("steady"), calm.began, calm.ended), STEADY_RATE, 0)
        for calm in good
        if not calm.is_wave
    ]
    waves = [
        fill(_within(soak.callers.of("waves"), calm.began, calm.ended), WAVE_RATE, WAVE_BURST)
        for calm in good
        if calm.is_wave
    ]
    return [
        Finding(
            scene,
            "at most 1 above each key's bucket while the store is there, else each gateway's part "
            "of it besides",
            f"{over:+.1f} ({key}, {start % 1e5:.2f} to {end % 1e5:.2f}); it was there for "
            f"{calm_for:.0%} of the time; with {len(gone)} outages {max(whole):+.1f}",
            over <= 1 and beyond <= 1 and calm_for >= _THERE,
        ),
        Finding(
            scene,
            f"at least {least:.0%} of it where nothing is disturbed",
            f"{_lowest(steady)}; of waves {_lowest(waves)}; "
            f"{sum(calm.misses for calm in soak.calms):.0f} decided without the store",
            min([*steady, *waves], default=1.0) >= least,
        ),
    ]


def _of_caps(scene: str, soak: Soak) -> Finding:
    """Who had more than his part when an outage began may finish that; others go by theirs."""
    long = [s for s in _merged(soak.hand.silent) if s[1] - s[0] > LEASE / 2]
    excused: list[str] = []
    beyond: list[str] = []
    for at, count in soak.counted.exceeded:
        is_due = any(start + LEASE - _SETTLES <= at <= end + _FINISHES for start, end in long)
        where = excused if is_due and count < CAP + soak.shape.processes else beyond
        where.append(f"{count} at {at % 1e5:.2f}")
    return Finding(
        scene,
        f"{CAP} at once at each endpoint at the most; in outages of half a lease and more, a lease "
        "after they began, one more for each other worker",
        f"{soak.counted.peak}" + _some(f"excused {each}" for each in excused) + _some(beyond),
        not beyond,
    )


def _of_counters(scene: str, soak: Soak, pages: list[Any]) -> Finding:
    fallen = [what for watch in soak.watches for what in watch.fallen]
    counted = sum(total(page, "citadel_gateway_requests_total", outcome="ok") for page in pages)
    crashes = sum(total(page, "citadel_gateway_crashes_total") for page in pages)
    outcomes = soak.callers.outcomes()
    lost = outcomes["answered"] - counted
    span = sum(ended - began for began, ended in soak.turns)
    most = soak.hand.kills * outcomes["answered"] / span  # of a second
    odd = Counter(
        line["event"] if line["event"] in _DEATHS else json.dumps(line)[:2000]
        for gateway in soak.hand.several
        for line in gateway.log.lines
        if line.get("level") == "error" or line.get("event") == "not a log line"
    )
    deaths = odd.pop(_DIED, 0)
    given_up = odd.pop(GIVEN_UP, 0)
    return Finding(
        scene,
        "no counter falls, all that is answered is counted but for a dead worker's last second, "
        "and nothing crashes",
        f"{len(fallen)} of {sum(w.pages for w in soak.watches)} pages; {lost:.0f} less after "
        f"{deaths} deaths; {crashes:.0f} crashes" + _some(fallen) + _some(map(str, odd.items())),
        not fallen
        and not crashes
        and not odd
        and given_up <= soak.hand.unsaid
        and soak.hand.kills - soak.hand.unsaid <= deaths <= soak.hand.kills
        and -outcomes["cut"] - outcomes["left"] <= lost <= most,
    )


def _of_growth(scene: str, soak: Soak) -> list[Finding]:
    """From the second minute on; of workers, those who have lived since."""
    began = soak.looks[0][0].at
    told, kept = [], True
    for number in range(soak.shape.gateways):
        looks = [turn[number] for turn in soak.looks if turn[number].at - began >= 60.0]
        if len(looks) < 3:
            return []
        first, last = looks[0], looks[-1]
        # At the first look it may have begun a moment ago.
        firsts = {pid: [lk for lk in looks if pid in lk.workers][:2][-1] for pid in last.workers}
        grown = max(last.workers[pid] - look.workers[pid] for pid, look in firsts.items())
        age = min(last.at - look.at for look in firsts.values())
        told.append(
            f"supervisor {first.supervisor:.0f} -> {last.supervisor:.0f} MB, workers "
            f"{max(last.workers.values()):.0f} MB and at most {grown:+.1f} in {age:.0f} s, "
            f"descriptors {first.descriptors} -> {last.descriptors}"
        )
        kept &= last.supervisor <= first.supervisor * 1.1 + 2
        kept &= grown <= 8.0 and last.descriptors <= 1.2 * first.descriptors + 8
    return [Finding(scene, "nothing grows for ever", "; ".join(told), kept)]


def _within(told: list[Told], start: float, end: float) -> list[Told]:
    return [each for each in told if start <= each.began and each.ended <= end]


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that overlap as one; in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + _SETTLES:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _some(what: Any) -> str:
    every = [*what]
    return "".join(f"; {each}" for each in every[:5]) + (f"; {len(every)}" if every[5:] else "")


def _lowest(fills: list[float]) -> str:
    return f"{min(fills):.1%} and more in {len(fills)} windows" if fills else "no window"
