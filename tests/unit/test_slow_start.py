"""An endpoint that comes back gets a tenth of its share, then more, whatever the algorithm."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest

from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.picker import Picker
from citadel_gateway.policy.roster import Roster
from citadel_gateway.policy.selection import make_picker
from citadel_gateway.policy.slow_start import SlowStart
from tests.unit.test_roster import every_algorithm

WINDOW = 10.0


def endpoint(name: str, *, room: int = 40, threshold: int = 1) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=threshold), lambda: 0.5)
    made = Endpoint(
        name, name, 1.0, room, None, breaker, HealthTracker(fall=1),
        slow_start=SlowStart(WINDOW),
    )  # fmt: skip
    made.probed(None, -100.0)
    return made


def roster(algorithm: str, endpoints: list[Endpoint]) -> Roster:
    made = Roster(make_picker(algorithm, random.Random(1)))
    made.add(endpoints)
    return made


def return_at(one: Endpoint, now: float) -> None:
    one.probed("down", now)
    one.probed(None, now)


def returned_by_probe(one: Endpoint) -> None:
    return_at(one, 0.0)


def returned_by_breaker(one: Endpoint) -> None:
    Slot.take(one, -60.0).close(Verdict.BAD, -60.0)
    Slot.take(one, 0.0).close(Verdict.GOOD, 0.0)


def returned_by_command(one: Endpoint) -> None:
    one.cordon()
    one.uncordon(0.0)


def newly_found(one: Endpoint) -> None:
    one.health = HealthTracker()
    one.is_newcomer = True
    one.probed(None, 0.0)


@pytest.mark.parametrize(
    "comes_back", [returned_by_probe, returned_by_breaker, returned_by_command, newly_found]
)
def test_whoever_comes_back_begins_with_a_tenth(comes_back: Callable[[Endpoint], None]) -> None:
    one = endpoint("a")
    comes_back(one)

    assert (one.warmth, one.limit) == (0.1, 4)


def test_at_the_start_of_the_gateway_nobody_is_slow() -> None:
    one = endpoint("a")

    assert (one.warmth, one.limit) == (1.0, 40)


@pytest.mark.parametrize(
    ("at", "share"), [(0.0, 0.1), (1.9, 0.1), (2.0, 0.2), (5.5, 0.5), (9.9, 0.9), (10.0, 1.0)]
)
def test_the_share_grows_with_time(at: float, share: float) -> None:
    assert SlowStart(WINDOW).share(1e6, 1e6 + at) == share


@pytest.mark.parametrize("since", [0.0, 0.1, 1234.567, 1e9 + 0.3])
def test_at_its_next_step_it_has_more(since: float) -> None:
    slow, share, steps = SlowStart(7.3), 0.1, 0
    while share < 1.0:
        at = slow.next_step(share, since)
        assert slow.share(since, at) > share
        share, steps = slow.share(since, at), steps + 1

    assert steps == 9


def test_its_next_step_lies_ahead_though_nobody_has_asked_for_the_last_ones() -> None:
    one = endpoint("a")
    assert one.may_take_more_at(0.0) == math.inf
    return_at(one, 0.0)

    assert [one.may_take_more_at(now) for now in (0.0, 2.0, 6.5, 9.9)] == [2.0, 3.0, 7.0, 10.0]
    assert one.may_take_more_at(10.0) == math.inf
    one.cool_down(0.5, 3.0)
    assert one.may_take_more_at(3.0) == 3.5


def test_without_a_window_all_is_there_at_once() -> None:
    assert SlowStart(0.0).share(5.0, 5.0) == 1.0


def test_a_small_endpoint_can_always_have_one_request() -> None:
    one = endpoint("a", room=1)
    return_at(one, 0.0)

    assert one.limit == 1


def hold(line: Roster, count: int, now: float) -> list[Slot]:
    held = []
    for _ in range(count):
        picked = line.choose((), now)
        if picked is not None:
            held.append(Slot.take(picked, now))
    return held


@every_algorithm
def test_its_concurrency_grows_step_by_step(algorithm: str) -> None:
    warm, back = endpoint("warm", room=200), endpoint("back", room=40)
    line = roster(algorithm, [warm, back])
    return_at(back, 0.0)

    for now, most in ((0.0, 4), (2.0, 8), (5.0, 20), (9.0, 36), (10.0, 40)):
        for slot in hold(line, 240, now):
            assert back.in_flight <= most
            slot.close(Verdict.GOOD, now)
        hold(line, 240, now)
        assert back.in_flight == most  # and it gets them, once the others have no room
        back.in_flight = warm.in_flight = 0
        back.eased()
        warm.eased()


def share_of(one: Endpoint, line: Roster, now: float) -> float:
    """Its share of a thousand requests, of which thirty are under way at any time."""
    turns: Counter[Endpoint] = Counter()
    held: list[Slot] = []
    for _ in range(1000):
        picked = line.choose((), now)
        assert picked is not None
        turns[picked] += 1
        held.append(Slot.take(picked, now))
        if len(held) == 30:
            held.pop(0).close(Verdict.GOOD, now)
    for slot in held:
        slot.close(Verdict.GOOD, now)
    return turns[one] / 1000


@every_algorithm
def test_its_share_of_the_requests_grows_too(algorithm: str) -> None:
    endpoints = [endpoint(name, room=1000) for name in "abc"]
    line = roster(algorithm, endpoints)
    for one in endpoints:
        one.latency.observe(1.0, -1.0)
    back = endpoints[0]
    return_at(back, 0.0)

    shares = [share_of(back, line, now) for now in (0.0, 5.0, 10.0)]

    expected = [0.1 / 2.1, 0.5 / 2.5, 1 / 3]
    assert shares == pytest.approx(expected, abs=0.06)


@every_algorithm
def test_afterwards_all_is_as_it_was(algorithm: str) -> None:
    endpoints = [endpoint(name) for name in "abc"]
    line = roster(algorithm, endpoints)
    return_at(endpoints[0], 0.0)
    for now in range(12):
        for slot in hold(line, 20, float(now)):
            slot.close(Verdict.GOOD, float(now))

    assert endpoints[0].warmth == 1.0
    assert line._warming == {}
    assert line._steps == []


@every_algorithm
def test_who_joins_a_line_halfway_goes_on_from_there(algorithm: str) -> None:
    warm, back = endpoint("warm", room=1000), endpoint("back", room=1000)
    return_at(back, 0.0)
    back.warm_up(5.0)
    line = roster(algorithm, [warm, back])
    warm.latency.observe(1.0, -1.0)
    back.latency.observe(1.0, -1.0)

    assert share_of(back, line, 5.0) == pytest.approx(1 / 3, abs=0.06)
    assert share_of(back, line, 10.0) == pytest.approx(1 / 2, abs=0.06)


@every_algorithm
def test_who_joins_a_line_halfway_need_not_be_chosen_to_go_on(algorithm: str) -> None:
    warm, back = endpoint("warm"), endpoint("back")
    return_at(back, 0.0)
    line = roster(algorithm, [warm, back])
    line.choose((), 10.0)

    assert back.limit == 40


@every_algorithm
def test_one_that_is_full_is_in_line_again_when_its_next_step_comes(algorithm: str) -> None:
    warm, back = endpoint("warm", room=1), endpoint("back", room=40)
    line = roster(algorithm, [warm, back])
    return_at(back, 0.0)
    hold(line, 50, 0.0)
    assert (warm.in_flight, back.in_flight) == (1, 4)

    hold(line, 50, 2.0)  # nobody has finished
    assert back.in_flight == 8
    hold(line, 50, 20.0)
    assert back.in_flight == 40
    assert line._steps == []


def test_one_that_stood_aside_while_it_warmed_up_does_not_wait_for_an_old_turn() -> None:
    picker = make_picker("round_robin", random.Random(1))
    others, back = [endpoint(name) for name in "ab"], endpoint("back")
    for one in (*others, back):
        picker.join(one)
    back.warmth = 0.1
    picker.reweigh(back)
    for _ in range(20):
        if picker.pick((), lambda _: True) is back:
            break
    picker.leave(back)  # its next turn is ten rounds ahead
    back.warmth = 1.0
    picker.reweigh(back)
    picker.join(back)

    assert back in [picker.pick((), lambda _: True) for _ in range(4)]


@every_algorithm
def test_it_is_hurried_when_there_is_nobody_else(algorithm: str) -> None:
    warm, back = endpoint("warm", room=1), endpoint("back", room=40)
    line = roster(algorithm, [warm, back])
    return_at(back, 0.0)
    hold(line, 41, 0.0)
    assert (warm.in_flight, back.in_flight) == (1, 4)

    assert not line.hurry(0.0)  # the other one has no room, but it will have
    warm.probed("down", 0.0)
    assert line.hurry(0.0)
    assert len(hold(line, 100, 0.0)) == 36
    assert not line.hurry(0.0)


@every_algorithm
def test_one_that_fails_while_it_warms_up_begins_again(algorithm: str) -> None:
    warm, back = endpoint("warm", room=500), endpoint("back", room=40)
    line = roster(algorithm, [warm, back])
    return_at(back, 0.0)
    line.choose((), 6.0)
    assert back.limit == 24
    return_at(back, 6.5)
    hold(line, 540, 7.0)

    assert back.in_flight == 4
    line.choose((), 16.5)
    assert back.limit == 40


@every_algorithm
def test_a_choice_between_two_steps_weighs_nobody_anew(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints = [endpoint(str(i), room=10_000) for i in range(50)]
    line = roster(algorithm, endpoints)
    for one in endpoints[:25]:
        return_at(one, 0.0)
    weighed: list[Endpoint] = []
    kind: type[Picker] = type(line.picker)
    reweigh = kind.reweigh

    def counting(self: Picker, one: Endpoint) -> None:
        weighed.append(one)
        reweigh(self, one)

    monkeypatch.setattr(kind, "reweigh", counting)

    for _ in range(300):
        line.choose((), 1.0)
    assert weighed == []
    for _ in range(300):
        line.choose((), 2.0)
    assert Counter(weighed) == dict.fromkeys(endpoints[:25], 1)
