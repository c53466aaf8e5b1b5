"""A cordoned endpoint gets nothing new, until it is uncordoned."""

from __future__ import annotations

import random

import pytest

from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, Verdict
from citadel_gateway.policy.cordons import Cordons, is_called
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.roster import Roster
from citadel_gateway.policy.selection import make_picker
from tests.unit.test_roster import every_algorithm

URL = "http://name:8000"


def endpoint(url: str = URL, model: str = "m") -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=1), lambda: 0.5)
    return Endpoint(model, url, 1.0, 2, None, breaker, HealthTracker(fall=1, healthy=True))


@every_algorithm
def test_it_gets_nothing_while_it_is_cordoned(algorithm: str) -> None:
    a, b = endpoint("http://a"), endpoint("http://b")
    line = Roster(make_picker(algorithm, random.Random(1)))
    line.add([a, b])
    a.cordon()
    assert {line.choose((), 1.0) for _ in range(30)} == {b}

    b.cordon()
    assert line.choose((), 1.0) is None
    assert not line.is_any_left((), 1.0)
    assert not line.is_any_full((), 1.0)

    a.uncordon(2.0)
    assert {line.choose((), 2.0) for _ in range(30)} == {a}


@every_algorithm
def test_one_that_is_full_is_not_waited_for_once_it_is_cordoned(algorithm: str) -> None:
    one = endpoint()
    line = Roster(make_picker(algorithm, random.Random(1)))
    line.add([one])
    slots = [Slot.take(one, 0.0), Slot.take(one, 0.0)]
    assert line.choose((), 0.0) is None
    assert line.is_any_full((), 0.0)

    one.cordon()
    assert line.choose((), 0.0) is None
    assert not line.is_any_full((), 0.0)
    for slot in slots:
        slot.close(Verdict.GOOD, 1.0)
    assert line.choose((), 1.0) is None
    assert line._returns == []  # it does not come back by itself
    assert line.next_chance(1.0, 5.0) == 5.0


def test_its_health_goes_on_and_does_not_bring_it_back() -> None:
    one = endpoint()
    one.cordon()
    one.probed("down", 1.0)
    one.probed(None, 2.0)

    assert one.health.healthy
    assert not one.is_available(2.0)


def test_a_cordon_is_remembered_for_endpoints_that_come_later() -> None:
    cordons = Cordons()
    cordons.cordon(URL, [endpoint(f"{URL} [10.0.0.1]")])
    later, elsewhere = endpoint(f"{URL} [10.0.0.2]"), endpoint(f"{URL} [10.0.0.2]", "other")
    for one in (later, elsewhere):
        cordons.apply(one)

    assert later.cordoned
    assert not elsewhere.cordoned

    cordons.uncordon([later], [later], 1.0)
    again = endpoint(f"{URL} [10.0.0.3]")
    cordons.apply(again)
    assert not again.cordoned


def test_one_address_that_is_wanted_again_does_not_bring_back_the_others() -> None:
    cordons = Cordons()
    one, other = endpoint(f"{URL} [10.0.0.1]"), endpoint(f"{URL} [10.0.0.2]")
    cordons.cordon(URL, [one, other])
    cordons.uncordon([one], [one, other], 1.0)
    returned = [endpoint(f"{URL} [10.0.0.{n}]") for n in (1, 2, 3)]
    for each in returned:
        cordons.apply(each)

    assert [each.cordoned for each in (one, other)] == [False, True]
    assert [each.cordoned for each in returned] == [False, True, False]


def test_a_cordon_of_one_address_is_for_that_address() -> None:
    cordons = Cordons()
    cordons.cordon(f"{URL} [10.0.0.1]", [endpoint(f"{URL} [10.0.0.1]")])
    same, other = endpoint(f"{URL} [10.0.0.1]"), endpoint(f"{URL} [10.0.0.2]")
    for one in (same, other):
        cordons.apply(one)

    assert same.cordoned
    assert not other.cordoned


@pytest.mark.parametrize(
    ("url", "called", "is_meant"),
    [
        (URL, URL, True),
        (f"{URL} [10.0.0.1]", URL, True),
        (f"{URL} [10.0.0.1]", f"{URL} [10.0.0.1]", True),
        (f"{URL} [10.0.0.1]", f"{URL} [10.0.0.2]", False),
        (f"{URL}1", URL, False),
    ],
)
def test_what_a_url_means(url: str, called: str, is_meant: bool) -> None:
    assert is_called(endpoint(url), called) is is_meant
