"""Where keys and sessions go: always to the same endpoint, unless that would be a trap."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Container
from functools import partial

import pytest

from citadel_gateway.policy.affinity import Affinity
from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.ring import Ring
from citadel_gateway.policy.roster import Roster
from citadel_gateway.policy.selection import make_picker
from citadel_gateway.policy.sessions import Sessions

both = pytest.mark.parametrize("algorithm", ["consistent_hash", "session_affinity"])

_rng = random.Random(5)
KEYS = [_rng.getrandbits(64) for _ in range(2000)]

ROOMY = {f"http://10.0.0.{i}:8000" for i in (7, 307, 607, 907)}


def endpoint(name: str, *, weight: float = 1.0, room: int = 10_000) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=1), lambda: 0.5)
    return Endpoint("m", name, weight, room, None, breaker, HealthTracker(fall=1, healthy=True))


def fleet(count: int) -> list[Endpoint]:
    return [endpoint(f"http://10.0.0.{i}:8000") for i in range(count)]


def roster(
    algorithm: str, endpoints: list[Endpoint], sessions: Sessions | None = None, **affinity: float
) -> Roster:
    about = Affinity(sessions=sessions or Sessions(), **affinity)  # type: ignore[arg-type]
    made = Roster(make_picker(algorithm, random.Random(1), None, about))
    made.add(endpoints)
    return made


def where(line: Roster, key: int, now: float = 0.0, tried: Container[Endpoint] = ()) -> Endpoint:
    """The endpoint that a request gets which ends at once."""
    picked = line.choose(tried, now, key)
    assert picked is not None
    Slot.take(picked, now).close(Verdict.NO_OPINION, now)
    return picked


def places(line: Roster, now: float = 0.0) -> dict[int, str]:
    return {key: where(line, key, now).url for key in KEYS}


def hold(line: Roster, key: int, count: int, now: float = 0.0) -> list[Slot]:
    held = []
    for _ in range(count):
        picked = line.choose((), now, key)
        assert picked is not None
        held.append(Slot.take(picked, now))
    return held


@both
def test_gateways_that_know_the_same_endpoints_agree_in_whatever_order_they_met_them(
    algorithm: str,
) -> None:
    endpoints = fleet(7)
    there = [endpoint(one.url) for one in reversed(endpoints)]

    assert places(roster(algorithm, endpoints)) == places(roster(algorithm, there))


@both
def test_keys_are_spread_by_weight(algorithm: str) -> None:
    endpoints = [endpoint(f"http://10.0.0.{w}:8000", weight=w) for w in (1, 2, 3, 4)]

    found = Counter(places(roster(algorithm, endpoints, heaviest=4.0)).values())

    for one in endpoints:
        assert found[one.url] / len(KEYS) == pytest.approx(one.weight / 10, rel=0.4)


def test_an_endpoint_that_comes_takes_over_its_part_of_the_keys_and_moves_no_other() -> None:
    line = roster("consistent_hash", fleet(9))
    before = places(line)
    newcomer = endpoint("http://10.0.1.1:8000")

    line.add([newcomer])

    moved = {key: place for key, place in places(line).items() if place != before[key]}
    assert set(moved.values()) == {newcomer.url}
    assert len(moved) / len(KEYS) == pytest.approx(0.1, abs=0.04)


@both
def test_an_endpoint_that_goes_takes_nothing_along_but_its_own_keys(algorithm: str) -> None:
    endpoints = fleet(10)
    line = roster(algorithm, endpoints)
    before, gone = places(line), endpoints[3]

    line.remove(gone)

    after = places(line)
    assert gone.url not in after.values()
    assert all(after[key] == place for key, place in before.items() if place != gone.url)


@both
def test_the_keys_of_one_that_is_down_are_with_all_the_others_and_where_they_would_be_without_it(
    algorithm: str,
) -> None:
    endpoints, without = fleet(5), fleet(5)
    down = endpoints[2]
    line = roster(algorithm, endpoints)
    theirs = [key for key, place in places(line).items() if place == down.url]
    down.probed("refused", 1.0)

    moved = {key: where(line, key, 1.0).url for key in theirs}

    assert set(moved.values()) == {one.url for one in endpoints if one is not down}
    other = roster(algorithm, [one for one in without if one.url != down.url])
    assert moved == {key: where(other, key).url for key in theirs}


@both
def test_no_key_is_a_trap_however_many_requests_have_it(algorithm: str) -> None:
    endpoints = fleet(4)

    hold(roster(algorithm, endpoints), KEYS[0], 400)

    most, _, _, least = sorted((one.in_flight for one in endpoints), reverse=True)
    if algorithm == "consistent_hash":
        assert most <= 126
        assert least > 20
    else:
        assert most <= 201  # it is a session that is told apart from others, and had its place


@both
def test_what_others_have_given_the_endpoints_counts_too(algorithm: str) -> None:
    endpoints = fleet(4)
    line = roster(algorithm, endpoints)
    for one in endpoints:
        one.in_flight = 50  # of which nobody tells: see `Picker`

    hold(line, KEYS[0], 100)

    bound = {"consistent_hash": 1.25, "session_affinity": 2.0}[algorithm]
    assert max(one.in_flight for one in endpoints) <= bound * 300 / 4 + 1


@both
def test_a_few_requests_at_once_stay_together(algorithm: str) -> None:
    endpoints = fleet(4)

    hold(roster(algorithm, endpoints), KEYS[0], 4)

    assert sorted(one.in_flight for one in endpoints) == [0, 0, 0, 4]


@both
def test_the_bound_is_kept_as_load_comes_and_goes(algorithm: str) -> None:
    rng, endpoints = random.Random(3), fleet(8)
    line = roster(algorithm, endpoints)
    held: list[Slot] = []
    for _ in range(5000):
        if held and rng.random() < 0.48:
            held.pop(rng.randrange(len(held))).close(Verdict.GOOD, 0.0)
        else:
            held += hold(line, rng.choice(KEYS[:5]), 1)
            newest = held[-1].endpoint
            bound = {"consistent_hash": 1.25, "session_affinity": 2.0}[algorithm]
            assert newest.in_flight <= max(4, bound * len(held) / 8 + 1)

    assert len(held) > 50


@both
def test_when_all_but_a_few_of_a_thousand_are_full_the_keys_still_agree_on_them(
    algorithm: str,
) -> None:
    def nearly_full() -> Roster:
        endpoints = [endpoint(f"http://10.0.0.{i}:8000", room=1) for i in range(1000)]
        line = roster(algorithm, endpoints)
        for one in endpoints:
            if one.url not in ROOMY:
                Slot.take(one, 0.0)
        return line

    found = places(nearly_full())

    assert set(found.values()) == ROOMY
    assert found == places(nearly_full())


@both
def test_without_a_key_requests_are_spread(algorithm: str) -> None:
    endpoints = fleet(4)
    line = roster(algorithm, endpoints)

    picked = Counter(line.choose((), 0.0) for _ in range(400))

    assert min(picked[one] for one in endpoints) > 50


@both
def test_asking_a_copy_changes_nothing(algorithm: str) -> None:
    line = roster(algorithm, fleet(3))
    before = places(line)

    shared = {id(one): one for one in line._ready}
    for key in KEYS[:50]:
        foretold = copy.deepcopy(line, shared).choose((), 0.0, key)
        assert foretold is not None
        assert foretold.url == before[key]
        copy.deepcopy(line, shared).choose({foretold}, 0.0, key)

    assert places(line) == before


def test_a_session_stays_when_an_endpoint_joins() -> None:
    line = roster("session_affinity", fleet(4))
    before = places(line)

    line.add([endpoint("http://10.0.1.1:8000")])

    assert places(line) == before
    fresh = {where(line, key ^ 1).url for key in KEYS}
    assert "http://10.0.1.1:8000" in fresh  # new ones do go there


def test_a_session_that_had_to_move_stays_where_it_went_when_its_first_endpoint_returns() -> None:
    line = roster("session_affinity", fleet(4))
    first = where(line, KEYS[0])
    first.probed("refused", 1.0)
    second = where(line, KEYS[0], 1.0)
    first.probed(None, 2.0)

    assert second is not first
    assert where(line, KEYS[0], 2.0) is second


def test_a_key_without_memory_goes_home_again() -> None:
    line = roster("consistent_hash", fleet(4))
    first = where(line, KEYS[0])
    first.probed("refused", 1.0)
    assert where(line, KEYS[0], 1.0) is not first
    first.probed(None, 2.0)

    assert where(line, KEYS[0], 2.0) is first


def test_a_session_leaves_an_endpoint_that_has_failed_it() -> None:
    line = roster("session_affinity", fleet(4))
    first = where(line, KEYS[0])

    second = where(line, KEYS[0], 0.0, tried={first})

    assert second is not first
    assert where(line, KEYS[0]) is second


def test_a_request_that_finds_its_endpoint_full_goes_elsewhere_and_the_session_does_not() -> None:
    endpoints = [endpoint(name, room=1) for name in "abcd"]
    line = roster("session_affinity", endpoints)
    first = where(line, KEYS[0])
    held = Slot.take(first, 0.0)

    other = where(line, KEYS[0])
    held.close(Verdict.GOOD, 0.0)

    assert other is not first
    assert where(line, KEYS[0]) is first


def test_a_session_that_finds_its_home_full_at_first_stays_where_it_began() -> None:
    endpoints = [endpoint(name, room=1) for name in "abcd"]
    home = where(roster("consistent_hash", endpoints), KEYS[0])
    line = roster("session_affinity", endpoints)
    held = Slot.take(home, 0.0)
    first = where(line, KEYS[0])
    held.close(Verdict.GOOD, 0.0)

    assert first is not home
    assert where(line, KEYS[0]) is first


def test_one_session_has_a_place_of_its_own_in_every_group() -> None:
    sessions = Sessions()
    line = roster("session_affinity", fleet(4), sessions, salt=1)
    other = roster("session_affinity", [endpoint(name) for name in "abcd"], sessions, salt=2)
    first, there = where(line, KEYS[0]), where(other, KEYS[0])
    first.probed("refused", 1.0)
    second = where(line, KEYS[0], 1.0)
    first.probed(None, 2.0)

    assert where(other, KEYS[0], 2.0) is there
    assert where(line, KEYS[0], 2.0) is second


def test_a_session_that_was_not_used_for_long_is_forgotten() -> None:
    line = roster("session_affinity", fleet(4), Sessions(idle=60.0))
    first = where(line, KEYS[0])
    first.probed("refused", 1.0)
    second = where(line, KEYS[0], 1.0)
    first.probed(None, 2.0)

    assert where(line, KEYS[0], 61.0) is second
    assert where(line, KEYS[0], 121.0) is second
    assert where(line, KEYS[0], 181.1) is first


def test_no_more_sessions_are_remembered_than_there_is_room_for() -> None:
    sessions = Sessions(idle=60.0, most=100)
    line = roster("session_affinity", fleet(4), sessions)
    elsewhere = move(line, KEYS[0], 0.0)
    for key in KEYS:
        where(line, key)
        assert where(line, KEYS[0]) is elsewhere  # the one that is used

    assert len(sessions._known) == 100
    assert sessions.find(KEYS[1], 0.0) is None
    for key in KEYS[1:60]:  # they expire two at a time, where new ones come
        where(line, key, 100.0)
    assert len(sessions._known) == 59


# Several gateways.


def tell(teller: Sessions, hearer: Sessions, line: Roster, stamp: int, now: float = 0.0) -> int:
    """Let *hearer*, whose roster is *line*, know the news of *teller*; returns how many."""
    known = {one.url: one for one in line._ready | line._away}
    news = list(teller.take_news(stamp, 1000))
    for key, place, stamped in news:
        hearer.hear(key, known[place.url], stamped, now)
    return len(news)


def two_gateways() -> tuple[Sessions, Roster, Sessions, Roster]:
    ours, theirs = Sessions(is_shared=True), Sessions(is_shared=True)
    return (
        ours, roster("session_affinity", fleet(4), ours),
        theirs, roster("session_affinity", fleet(4), theirs),
    )  # fmt: skip


def move(line: Roster, key: int, now: float) -> Endpoint:
    """Let the place of *key* be down for a moment in which it is used."""
    first = where(line, key, now)
    first.probed("refused", now)
    second = where(line, key, now)
    first.probed(None, now)
    return second


def test_what_is_at_home_needs_not_be_told() -> None:
    ours, line, theirs, other = two_gateways()

    assert places(line) == places(other)
    assert tell(ours, theirs, other, 1) == 0


def test_a_session_that_has_moved_has_moved_everywhere() -> None:
    ours, line, theirs, other = two_gateways()
    where(other, KEYS[0])
    second = move(line, KEYS[0], 1.0)

    assert tell(ours, theirs, other, 1, 1.0) == 1

    assert where(other, KEYS[0], 2.0).url == second.url
    assert tell(theirs, ours, line, 2, 2.0) == 0
    assert tell(ours, theirs, other, 3, 2.0) == 0


def test_a_session_that_moves_back_home_does_so_everywhere() -> None:
    ours, line, theirs, other = two_gateways()
    home = where(line, KEYS[0], 0.0)
    second = move(line, KEYS[0], 1.0)
    tell(ours, theirs, other, 1, 1.0)
    for one in line._ready:
        if one not in (home, second):
            one.cordon()

    assert move(line, KEYS[0], 2.0) is home
    tell(ours, theirs, other, 2, 2.0)

    assert where(other, KEYS[0], 2.0).url == home.url


@pytest.mark.parametrize("first_to_hear", ["ours", "theirs"])
def test_of_two_decisions_the_later_one_counts_for_both(first_to_hear: str) -> None:
    ours, line, theirs, other = two_gateways()
    home = where(line, KEYS[0])
    a, b, _ = [one for one in line._ready if one is not home]
    for one, here in ((a, line), (b, other)):
        for mine in here._ready:
            if mine.url not in (home.url, one.url):
                mine.cordon()
        assert move(here, KEYS[0], 1.0).url == one.url
        for mine in [*here._away, *here._ready]:
            mine.uncordon(1.0)
    ((key, _, earlier),) = ours.take_news(10, 9)
    ((_, _, later),) = theirs.take_news(11, 9)
    there = next(one for one in other._ready if one.url == a.url)
    hears = [partial(ours.hear, key, b, later, 2.0), partial(theirs.hear, key, there, earlier, 2.0)]
    for hear in hears if first_to_hear == "ours" else reversed(hears):
        hear()

    assert where(line, KEYS[0], 3.0).url == where(other, KEYS[0], 3.0).url == b.url


def test_who_hears_before_having_told_goes_by_what_is_newer() -> None:
    ours, line, theirs, other = two_gateways()
    second = move(line, KEYS[0], 1.0)
    elsewhere = next(one for one in other._ready if one.url != second.url)
    ours.hear(KEYS[0], next(e for e in line._ready if e.url == elsewhere.url), 5, 1.0)

    tell(ours, theirs, other, 6, 1.0)

    assert where(line, KEYS[0], 2.0) is second
    assert where(other, KEYS[0], 2.0).url == second.url


def test_where_an_endpoint_joins_the_others_hear_that_the_session_has_stayed() -> None:
    ours, line, theirs, other = two_gateways()
    before = places(line)
    for here in (line, other):
        here.add([endpoint("http://10.0.1.1:8000")])
    lured = next(k for k in KEYS if where(other, k ^ 0).url == "http://10.0.1.1:8000")

    assert where(line, lured, 1.0).url == before[lured]
    ((_, place, stamp),) = ours.take_news(1, 9)
    assert stamp == 1  # it has become a decision
    theirs.hear(lured, next(one for one in other._ready if one.url == place.url), stamp, 1.0)

    assert where(other, lured, 1.0).url == before[lured]


def test_a_newcomer_hears_within_a_minute_of_use_what_is_elsewhere_and_only_from_one() -> None:
    ours, line, theirs, other = two_gateways()
    second = move(line, KEYS[0], 0.0)
    tell(ours, theirs, other, 1, 0.0)
    new = Sessions(is_shared=True)
    newcomer = roster("session_affinity", fleet(4), new)

    where(line, KEYS[0], 59.0)
    assert tell(ours, new, newcomer, 2, 59.0) == 0
    where(line, KEYS[0], 60.0)
    again = list(ours.take_news(3, 9))
    for key, place, stamp in again:
        new.hear(key, next(e for e in newcomer._ready if e.url == place.url), stamp, 60.0)
        theirs.hear(key, next(e for e in other._ready if e.url == place.url), stamp, 60.0)
    where(other, KEYS[0], 61.0)

    assert [stamp for _, _, stamp in again] == [1]  # it is no new decision
    assert where(newcomer, KEYS[0], 61.0).url == second.url
    assert tell(theirs, ours, line, 4, 61.0) == 0


def test_news_are_told_in_portions_and_none_is_lost() -> None:
    ours, line, _, _ = two_gateways()
    moved = {key: move(line, key, 0.0).url for key in KEYS[:50]}

    portions = []
    while news := list(ours.take_news(1, 20)):
        portions.append(news)

    assert [len(news) for news in portions] == [20, 20, 10]
    assert {key: place.url for news in portions for key, place, _ in news} == moved


def test_who_has_nobody_to_tell_keeps_no_news() -> None:
    sessions = Sessions()
    line = roster("session_affinity", fleet(4), sessions)
    move(line, KEYS[0], 0.0)

    assert list(sessions.take_news(1, 9)) == []


def test_a_place_that_nobody_has_to_do_with_any_more_is_not_kept() -> None:
    sessions = Sessions(is_shared=True)
    sessions.begin(1, endpoint("a"), 0.0, at_home=False)

    assert list(sessions.take_news(1, 9)) == []


def test_points_of_one_that_leaves_before_it_was_looked_for_are_gone() -> None:
    ring, (a, b, c) = Ring(), fleet(3)
    for one in (a, b):
        ring.add(one, 1.0)
    ring.remove(a)
    assert {ring.home(key) for key in KEYS} == {b}
    ring.add(c, 1.0)  # in its place

    assert {ring.home(key) for key in KEYS} == {b, c}
    assert a not in ring
