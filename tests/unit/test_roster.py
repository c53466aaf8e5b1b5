"""Who is in line: however many stand aside, the right ones are found, and quickly."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.roster import Roster
from citadel_gateway.policy.selection import make_picker
from tests.unit.test_selection import ALGORITHMS

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def endpoint(name: str, *, room: int = 100, weight: float = 1.0) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=1), lambda: 0.5)
    return Endpoint(name, name, weight, room, None, breaker, HealthTracker(fall=1, healthy=True))


def roster(algorithm: str, endpoints: list[Endpoint]) -> Roster:
    made = Roster(make_picker(algorithm, random.Random(1)))
    made.add(endpoints)
    return made


def fail(one: Endpoint, now: float) -> None:
    Slot.take(one, now).close(Verdict.BAD, now)


@every_algorithm
def test_whatever_happens_it_finds_one_that_fits_exactly_if_there_is_one(algorithm: str) -> None:
    rng, now = random.Random(7), 0.0
    endpoints = [endpoint(str(i), room=1 + i % 3, weight=1 + i % 4) for i in range(9)]
    line = roster(algorithm, endpoints)
    held: list[Slot] = []
    chosen = nothing = 0
    for _ in range(6000):
        now += rng.choice([0.0, 0.1, 1.0])
        one = rng.choice(endpoints)
        match rng.randrange(12):
            case 0:
                one.probed(rng.choice([None, "down"]), now)
            case 1:
                one.cool_down(rng.random() * 5, now)
            case 2 | 3 | 4 if held:
                verdict = rng.choices(list(Verdict), [8, 1, 1])[0]
                held.pop(rng.randrange(len(held))).close(verdict, now)
            case _:
                tried = frozenset(rng.sample(endpoints, rng.choice([0, 0, 1, 8])))
                left = [e for e in endpoints if e not in tried and e.is_available(now)]
                fitting = [e for e in left if e.has_room()]
                assert line.is_any_left(tried, now) == bool(left)
                picked = line.choose(tried, now)
                if picked is None:
                    assert fitting == []
                    assert line.is_any_full(tried, now) == bool(left)
                    nothing += 1
                else:
                    assert picked in fitting
                    held.append(Slot.take(picked, now))
                    chosen += 1

    assert chosen > 500
    assert nothing > 50


@every_algorithm
def test_it_comes_back_at_the_very_moment_at_which_its_rest_ends(algorithm: str) -> None:
    one = endpoint("a")
    line = roster(algorithm, [one])
    fail(one, 0.1)
    ends = one.breaker.opens_again_at()
    assert ends is not None

    assert line.choose((), 0.2) is None
    assert line.choose((), ends - 0.001) is None
    assert line.choose((), ends) is one


@pytest.mark.parametrize(
    ("down", "cooling", "failed", "chance"),
    [
        ("", "", "ab", 60.0),
        ("a", "", "b", 5.0),
        ("a", "b", "", 3.0),
        ("ab", "ab", "", 5.0),
        ("ab", "", "ab", 60.0),
        ("b", "", "ab", 60.0),
    ],
)
def test_the_next_chance_is_the_soonest_end_of_a_rest_or_the_next_probe(
    down: str, cooling: str, failed: str, chance: float
) -> None:
    endpoints = [endpoint("a"), endpoint("b")]
    line = roster("round_robin", endpoints)
    for one in endpoints:
        if one.url in failed:
            fail(one, 0.0)
        if one.url in cooling:
            one.cool_down(3.0, 0.0)
        if one.url in down:
            one.probed("down", 0.0)
    tried = frozenset(endpoints)

    assert line.next_chance(0.0, 5.0) == chance  # also before anybody has looked
    assert line.choose(tried, 0.0) is None
    assert line.next_chance(0.0, 5.0) == chance
    assert line.choose((), 0.0) is None
    assert line.next_chance(0.0, 5.0) == chance


def test_without_endpoints_the_next_chance_is_the_next_probe() -> None:
    assert roster("round_robin", []).next_chance(0.0, 5.0) == 5.0


@every_algorithm
def test_while_its_probe_is_out_it_is_asked_again_in_a_second_or_when_that_ends(
    algorithm: str,
) -> None:
    one = endpoint("a")
    line = roster(algorithm, [one])
    fail(one, 0.0)
    probe = Slot.take(one, 60.0)

    assert line.choose((), 60.0) is None
    probe.close(Verdict.GOOD, 60.5)
    assert line.choose((), 60.5) is one


@every_algorithm
def test_one_that_was_removed_gets_nothing_even_when_its_last_request_ends(algorithm: str) -> None:
    a, b = endpoint("a"), endpoint("b")
    line = roster(algorithm, [a, b])
    slot = Slot.take(a, 0.0)
    line.remove(a)
    slot.close(Verdict.GOOD, 1.0)
    a.probed("down", 2.0)
    a.probed(None, 3.0)

    assert {line.choose((), 3.0) for _ in range(20)} == {b}
    assert a.watchers == []


@every_algorithm
def test_one_that_was_added_later_gets_its_share_from_then_on(algorithm: str) -> None:
    a, b = endpoint("a"), endpoint("b")
    line = roster(algorithm, [a])
    for _ in range(100):
        assert line.choose((), 0.0) is a
    line.add([b])

    turns = Counter(line.choose((), 0.0) for _ in range(100))

    assert turns[a] == pytest.approx(50, abs=20)
    assert turns[b] == 100 - turns[a]


@every_algorithm
@pytest.mark.parametrize("state", ["all are well", "half are down", "one is well", "one is free"])
def test_of_a_thousand_only_a_few_are_looked_at(
    algorithm: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints = [endpoint(str(i), room=1) for i in range(1000)]
    line = roster(algorithm, endpoints)
    match state:
        case "half are down":
            for one in endpoints[::2]:
                one.probed("down", 0.0)
        case "one is well":
            for one in endpoints[1:]:
                one.probed("down", 0.0)
        case "one is free":
            for one in endpoints[1:]:
                Slot.take(one, 0.0)
    for _ in range(1000):
        line.choose((), 0.0)  # they are met, and stand aside
    looks = 0
    is_available = Endpoint.is_available

    def counting(self: Endpoint, now: float) -> bool:
        nonlocal looks
        looks += 1
        return is_available(self, now)

    monkeypatch.setattr(Endpoint, "is_available", counting)
    for _ in range(100):
        assert line.is_any_left((), 1.0)
        assert line.choose((), 1.0) is not None

    assert looks <= 100 * 20  # those who are down and were not met yet, too
