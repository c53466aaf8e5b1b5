"""When too few endpoints are healthy, health is ignored; when none is, it is not."""

from __future__ import annotations

import random

import pytest

from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.quorum import Quorum
from citadel_gateway.policy.roster import Roster
from citadel_gateway.policy.selection import make_picker
from citadel_gateway.policy.slow_start import SlowStart
from tests.unit.test_roster import every_algorithm


def endpoint(name: str) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=1), lambda: 0.5)
    return Endpoint(
        name, name, 1.0, 100, None, breaker, HealthTracker(fall=1), slow_start=SlowStart(10.0)
    )


class Pool:
    """Endpoints of one model; the first so many are healthy, the others are not."""

    def __init__(self, healthy: int, ill: int, *, unknown: int = 0, threshold: float = 0.5) -> None:
        self.changes: list[bool] = []
        self.quorum = Quorum(threshold, self.changes.append)
        self.endpoints = [endpoint(str(n)) for n in range(healthy + ill + unknown)]
        for one in self.endpoints:
            self.quorum.add(one)
        for place, one in enumerate(self.endpoints[: healthy + ill]):
            one.probed(None if place < healthy else "down", 0.0)

    def panics(self) -> bool:
        return self.quorum.is_panicking

    @property
    def usable(self) -> list[bool]:
        return [one.is_available(1.0) for one in self.endpoints]


@pytest.mark.parametrize(
    ("healthy", "ill", "threshold", "panics"),
    [
        (1, 2, 0.5, True),
        (2, 2, 0.5, False),
        (1, 1, 0.5, False),
        (3, 4, 0.5, True),
        (1, 9, 0.1, False),
        (1, 10, 0.1, True),
        (1, 9, 0.0, False),
        (0, 4, 0.5, False),
        (0, 1, 1.0, False),
        (3, 1, 1.0, True),
        (4, 0, 1.0, False),
    ],
)
def test_it_panics_below_the_share_but_not_at_none(
    healthy: int, ill: int, threshold: float, panics: bool
) -> None:
    pool = Pool(healthy, ill, threshold=threshold)

    assert pool.panics() is panics
    assert pool.usable == [True] * healthy + [panics] * ill


def test_it_is_told_when_panic_begins_and_ends() -> None:
    pool = Pool(1, 2)
    assert pool.changes == [True]

    pool.endpoints[1].probed(None, 1.0)
    assert pool.changes == [True, False]
    assert pool.usable == [True, True, False]


def test_when_the_last_healthy_one_falls_panic_is_over_and_it_is_an_outage() -> None:
    pool = Pool(1, 2)
    pool.endpoints[0].probed("down", 1.0)

    assert pool.changes == [True, False]
    assert pool.usable == [False] * 3


def test_whoever_was_not_probed_yet_neither_counts_nor_is_used() -> None:
    pool = Pool(1, 2, unknown=5)

    assert pool.panics()
    assert pool.usable == [True] * 3 + [False] * 5
    assert not Pool(1, 0, unknown=5).panics()


def test_a_cordoned_one_neither_counts_nor_is_used() -> None:
    pool = Pool(1, 2)
    pool.endpoints[2].cordon()

    assert not pool.panics()
    pool.endpoints[2].uncordon(1.0)
    assert pool.panics()
    pool.endpoints[0].cordon()
    assert not pool.panics()
    assert pool.usable == [False] * 3


def test_breakers_and_cool_downs_are_obeyed_all_the_same() -> None:
    pool = Pool(1, 3)
    Slot.take(pool.endpoints[1], 0.5).close(Verdict.BAD, 0.5)
    pool.endpoints[2].cool_down(10.0, 0.5)

    assert pool.usable == [True, False, False, True]


def test_who_becomes_healthy_in_a_panic_was_at_work_already_and_does_not_start_slowly() -> None:
    pool = Pool(1, 3)
    assert pool.panics()
    pool.endpoints[1].probed(None, 1.0)

    assert pool.endpoints[1].warmth == 1.0


def test_whoever_is_removed_is_not_needed_any_more() -> None:
    pool = Pool(1, 4)
    gone = pool.endpoints[4]
    pool.quorum.remove(gone)
    assert not gone.is_available(1.0)

    for one in pool.endpoints[2:4]:
        pool.quorum.remove(one)
    assert pool.changes == [True, False]


@every_algorithm
def test_in_a_panic_all_get_requests_and_afterwards_the_healthy_ones(algorithm: str) -> None:
    pool = Pool(3, 0)
    line = Roster(make_picker(algorithm, random.Random(1)))
    line.add(pool.endpoints)
    for one in pool.endpoints[1:]:
        one.probed("down", 1.0)
        for _ in range(30):
            line.choose((), 1.0)  # who is down is met, and stands aside
    assert {line.choose((), 1.0) for _ in range(30)} == set(pool.endpoints)

    pool.endpoints[1].probed(None, 2.0)
    assert {line.choose((), 2.0) for _ in range(30)} == set(pool.endpoints[:2])
