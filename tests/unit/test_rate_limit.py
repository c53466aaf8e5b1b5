"""How often somebody may ask, counted exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.rate_limit import (
    Allowance,
    ClientBuckets,
    Refusal,
    TokenBucket,
    take,
    take_share,
)

steady = settings(deadline=None, derandomize=True)


def admitted(bucket: TokenBucket, times: list[float]) -> int:
    count = 0
    for now in times:
        if bucket.wait(now) == 0.0:
            bucket.spend(now)
            count += 1
    return count


def test_sixty_a_minute_with_a_burst_of_ten_admits_exactly_that() -> None:
    bucket = TokenBucket(rate=1.0, burst=10.0)

    assert admitted(bucket, [i / 10 for i in range(1001)]) == 10 + 100


@pytest.mark.parametrize("start", [0.0, 0.1, 1e6 + 0.123, 2.5e6 / 7], ids=str)
@pytest.mark.parametrize(
    ("rate", "burst"), [(50.0, 100.0), (3.0, 7.0), (0.7, 5.0), (1000.0, 1.0)], ids=str
)
def test_a_full_burst_fits_at_once_wherever_the_clock_stands(
    start: float, rate: float, burst: float
) -> None:
    assert admitted(TokenBucket(rate, burst), [start] * 2000) == burst


@steady
@given(
    rate=st.integers(1, 100),
    burst=st.integers(1, 50),
    start=st.sampled_from([0, 17, 1_000_000]),
    ticks=st.lists(st.integers(0, 500), max_size=150),
)
def test_it_admits_what_a_bucket_counted_in_fractions_admits(
    rate: int, burst: int, start: int, ticks: list[int]
) -> None:
    bucket, level, at, expected = TokenBucket(rate, burst), Fraction(burst), Fraction(start), 0
    times = []
    for tick in ticks:
        now = at + Fraction(tick, 1000)
        level, at = min(Fraction(burst), level + (now - at) * rate), now
        times.append(float(now))
        if level >= 1:
            level -= 1
            expected += 1

    assert admitted(bucket, times) == expected


@steady
@given(rate=st.floats(0.01, 1e4), burst=st.integers(1, 1000), start=st.floats(0, 1e6))
def test_who_waits_as_long_as_told_is_let_in_and_no_sooner(
    rate: float, burst: int, start: float
) -> None:
    bucket = TokenBucket(rate, burst)
    assert admitted(bucket, [start] * (burst + 1)) == burst
    wait = bucket.wait(start)

    assert wait == pytest.approx(1 / rate, abs=1e-5)
    assert bucket.wait(start + wait) == 0.0
    assert bucket.wait(start + wait / 2) > 0 or wait < 1e-4


def test_what_is_never_going_to_fit_waits_for_ever() -> None:
    assert TokenBucket(1.0, 10.0).wait(0.0, cost=11.0) == math.inf


def test_remaining_and_reset_tell_what_the_bucket_holds() -> None:
    bucket = TokenBucket(rate=2.0, burst=4.0)
    told = [(bucket.allowance(0.0).remaining, bucket.allowance(0.0).reset)]
    for _ in range(4):
        bucket.spend(0.0)
        told.append((bucket.allowance(0.0).remaining, bucket.allowance(0.0).reset))

    assert told == [(4, 0.0), (3, 0.5), (2, 1.0), (1, 1.5), (0, 2.0)]
    assert [bucket.allowance(t).remaining for t in (0.4, 0.5, 1.9, 2.0, 9.0)] == [0, 1, 3, 4, 4]
    assert (bucket.is_full(1.9), bucket.is_full(2.0)) == (False, True)


@steady
@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 100),
    pauses=st.lists(st.floats(0, 5), max_size=40),
)
def test_remaining_is_how_many_fit_now(rate: float, burst: int, pauses: list[float]) -> None:
    bucket, now = TokenBucket(rate, burst), 1e6
    for pause in pauses:
        now += pause
        admitted(bucket, [now])

    promised = bucket.allowance(now).remaining

    assert admitted(bucket, [now] * (burst + 1)) == promised


def test_who_is_refused_by_one_limit_pays_no_other() -> None:
    wide, narrow = TokenBucket(1.0, 10.0), TokenBucket(1.0, 1.0)
    limits = [("global", wide), ("key", narrow)]

    assert take(limits, 0.0) == Allowance(limit=1, remaining=0, reset=1.0)
    assert take(limits, 0.25) == Refusal("key", 0.75, Allowance(1, 0, 0.75))
    assert wide.allowance(0.25).remaining == 9


def test_a_refusal_names_the_limit_that_lasts_longest() -> None:
    slow, fast = TokenBucket(0.1, 1.0), TokenBucket(10.0, 1.0)
    slow.spend(0.0)
    fast.spend(0.0)

    refusal = take([("fast", fast), ("slow", slow)], 0.0)

    assert refusal == Refusal("slow", 10.0, Allowance(1, 0, 10.0))


def test_the_allowance_is_that_of_the_limit_nearest_to_its_end() -> None:
    limits = [("a", TokenBucket(1.0, 100.0)), ("b", TokenBucket(1.0, 4.0))]

    assert take(limits, 0.0) == Allowance(limit=4, remaining=3, reset=1.0)


def test_a_client_keeps_its_bucket() -> None:
    clients = ClientBuckets(rate=1.0, burst=1.0)
    clients.of("a", 0.0).spend(0.0)

    assert clients.of("a", 0.5).wait(0.5) == 0.5
    assert clients.of("b", 0.5).wait(0.5) == 0.0


def test_full_buckets_are_forgotten_and_others_are_not() -> None:
    clients = ClientBuckets(rate=1.0, burst=2.0)
    clients.of("busy", 0.0).spend(0.0)
    clients.of("idle", 0.0)

    assert clients.forget_full(0.5) == 1
    assert clients.of("busy", 0.5).wait(0.5, cost=2.0) == 0.5


def test_ten_thousand_strangers_do_not_take_more_memory_than_allowed() -> None:
    clients = ClientBuckets(rate=0.001, burst=1.0, most=100)
    for i in range(10_000):
        clients.of(f"stranger {i}", 0.0).spend(0.0)

    assert len(clients) == 100


def test_who_was_seen_last_is_remembered_when_strangers_come() -> None:
    clients = ClientBuckets(rate=0.001, burst=1.0, most=3)
    for name in ("a", "b", "c", "a", "d"):
        clients.of(name, 0.0).spend(0.0)

    assert clients.of("a", 1.0).allowance(1.0).remaining == 0
    assert clients.of("b", 1.0).allowance(1.0).remaining == 1, "the least recent one was forgotten"


def test_buckets_that_filled_up_make_room_by_themselves() -> None:
    clients = ClientBuckets(rate=1.0, burst=1.0)
    for i in range(50):
        clients.of(f"early {i}", 0.0).spend(0.0)

    clients.of("late", 10.0)

    assert len(clients) == 1


@pytest.mark.parametrize("among", [2, 10, 100])
@pytest.mark.parametrize("burst", [1.0, 10.0, 1000.0])
def test_those_who_cannot_ask_each_other_keep_the_rate_together(among: int, burst: float) -> None:
    several = [TokenBucket(rate=10.0, burst=burst) for _ in range(among)]
    for bucket in several:
        bucket.tat = burst / 10.0  # as all of them have heard, everything is spent
    seconds = 200

    passed = sum(
        isinstance(take_share([("global", bucket)], tick / 20, among), Allowance)
        for tick in range(20 * seconds)
        for bucket in several
    )

    assert 0.8 * 10 * seconds < passed <= 10 * seconds + among
