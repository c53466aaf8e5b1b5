"""Units taken in advance: fewer questions, and no limit gets any wider by it."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.claim import Claim, spend_leased
from citadel_gateway.policy.rate_limit import Allowance, Refusal, TokenBucket, take

steady = settings(deadline=None, derandomize=True)


@attrs.define(eq=False)
class Holder:
    """One gateway of several, with its own view of buckets that a store keeps.

    :param tats: the store.
    """

    tats: dict[str, float]
    buckets: dict[str, TokenBucket]
    asked: int = 0

    def ask(self, names: list[str], now: float) -> Allowance | Refusal | None:
        """``None`` if leases sufficed."""
        named = [(name, self.buckets[name]) for name in names]
        if spend_leased(named, now):
            return None
        claim = Claim.of(named, now)
        return claim.settle(self.store(claim, now), now)

    def store(self, claim: Claim, now: float) -> Allowance | Refusal:
        self.asked += 1
        for name, bucket in claim.asked:
            bucket.learn(self.tats.get(name, 0.0), now)
        result = take(claim.asked, now, claim.ahead)
        if isinstance(result, Allowance):
            self.tats |= {name: bucket.tat for name, bucket in claim.asked}
        return result

    def passes(self, names: list[str], now: float) -> bool:
        return not isinstance(self.ask(names, now), Refusal)


def holders(count: int, **shapes: tuple[float, float]) -> list[Holder]:
    tats: dict[str, float] = {}
    return [
        Holder(tats, {name: TokenBucket(*shape) for name, shape in shapes.items()})
        for _ in range(count)
    ]


def most_in_any_window(times: list[float], rate: float) -> float:
    """Admitted in a window, less what the rate alone allows in it, at most."""
    worst, least = 0.0, 0.0
    for i, at in enumerate(times):
        least = min(least, i - at * rate)
        worst = max(worst, i + 1 - at * rate - least)
    return worst


@steady
@given(
    rate=st.integers(1, 3000),
    seconds=st.sampled_from([0.1, 0.5, 1.0, 5.0]),
    count=st.integers(1, 5),
    steps=st.lists(
        st.tuples(st.sampled_from([0.0, 0.0001, 0.002, 0.02, 0.04, 0.3]), st.integers(0, 4),
                  st.integers(1, 200)),
        max_size=60,
    ),
)  # fmt: skip
def test_whoever_asks_whenever_no_window_has_more_than_the_bucket(
    rate: int, seconds: float, count: int, steps: list[tuple[float, int, int]]
) -> None:
    burst = max(1, int(rate * seconds))
    all_ = holders(count, global_=(rate, burst))
    now, admitted = 1000.0, []
    for pause, who, many in steps:
        now += pause
        for _ in range(many):
            now += 0.00005
            if all_[who % count].passes(["global_"], now):
                admitted.append(now - 1000.0)

    assert most_in_any_window(admitted, rate) <= burst + 1


def drive(several: list[Holder], until: float, gap: Callable[[], float]) -> tuple[int, int]:
    now, admitted, refused, turn = 1000.0, 0, 0, 0
    while now < 1000.0 + until:
        if several[turn % len(several)].passes(["global_"], now):
            admitted += 1
        else:
            refused += 1
        turn += 1
        now += gap()
    return admitted, refused


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize(("rate", "burst"), [(1000, 5000), (500, 500), (60, 20), (2000, 200)])
def test_who_offers_too_much_gets_nearly_all_of_the_bucket(
    count: int, rate: float, burst: float
) -> None:
    rng = random.Random(count)
    several = holders(count, global_=(rate, burst))

    admitted, refused = drive(several, 6.0, lambda: rng.expovariate(4000))

    assert refused
    assert 0.97 * (burst + rate * 6) <= admitted <= burst + rate * 6 + 1


@pytest.mark.parametrize("offered", [60, 100, 150, 400])
@pytest.mark.parametrize("burst", [60, 200, 600])
def test_requests_that_come_close_by_chance_take_little_in_advance_that_is_lost(
    offered: int, burst: int
) -> None:
    rng = random.Random(burst)
    lasts = 1.5 * burst / (offered - 20) + 1.0
    fills = []
    for _ in range(10):
        admitted, _ = drive(
            holders(4, global_=(20, burst)), lasts, lambda: rng.expovariate(offered)
        )
        fills.append(admitted / (burst + 20 * lasts))

    assert min(fills) >= 0.96
    assert sum(fills) / len(fills) >= 0.97


def test_below_the_limit_nobody_is_refused_and_few_questions_are_asked() -> None:
    rng = random.Random(7)
    several = holders(4, global_=(4000, 20000))

    admitted, refused = drive(several, 3.0, lambda: rng.expovariate(3600))

    assert not refused
    assert sum(holder.asked for holder in several) < admitted / 8


def test_who_asks_seldom_takes_nothing_in_advance() -> None:
    [holder] = holders(1, global_=(10, 50))

    for i in range(40):
        assert holder.passes(["global_"], 1000.0 + i)

    assert holder.asked == 40


def test_who_is_refused_by_one_bucket_pays_no_leased_unit_of_another() -> None:
    [holder] = holders(1, wide=(1000, 5000), narrow=(0.001, 1))
    now = 1000.0
    while not (lease := holder.buckets["wide"].lease) or lease.left < 5:
        now += 0.0001
        assert holder.passes(["wide"], now)
    assert holder.passes(["wide", "narrow"], now)
    left = lease.left

    assert not holder.passes(["wide", "narrow"], now)

    assert lease.left == left


def test_a_lease_ends_though_units_are_left() -> None:
    [holder] = holders(1, global_=(1000, 5000))
    now = 1000.0
    while not (lease := holder.buckets["global_"].lease) or lease.left < 5:
        now += 0.0001
        assert holder.passes(["global_"], now)

    assert not spend_leased([("global_", holder.buckets["global_"])], lease.until)
    assert spend_leased([("global_", holder.buckets["global_"])], lease.until - 1e-4)


def test_one_question_at_a_time_asks_for_more() -> None:
    [holder] = holders(1, global_=(1000, 5000))
    named = [("global_", holder.buckets["global_"])]
    now = 1000.0
    holder.passes(["global_"], now)
    holder.passes(["global_"], now + 0.0001)
    while holder.buckets["global_"].lease is not None and holder.buckets["global_"].lease.left:
        holder.passes(["global_"], now + 0.0002)

    first, second = Claim.of(named, now + 0.0003), Claim.of(named, now + 0.0003)

    assert first.ahead[0] > 0
    assert second.ahead == [0]
    second.settle(holder.store(second, now + 0.0004), now + 0.0004)
    assert Claim.of(named, now + 0.0005).ahead == [0]
    first.fail()
    second = Claim.of(named, now + 0.0006)
    assert second.ahead[0] > 0


def test_what_is_told_of_a_bucket_counts_leased_units_as_there() -> None:
    [holder] = holders(1, global_=(1000, 5000))
    bucket, now = holder.buckets["global_"], 1000.0
    while not (lease := bucket.lease) or lease.left < 5:
        now += 0.0001
        holder.passes(["global_"], now)
    before, left = bucket.allowance(now).remaining, lease.left

    holder.ask(["global_"], now)

    assert lease.left == left - 1
    assert bucket.allowance(now).remaining == before - 1


def test_a_bucket_that_is_full_again_has_no_room_for_what_is_leased() -> None:
    one, other = holders(2, global_=(1000, 5000))
    now = 1000.0
    while not (lease := one.buckets["global_"].lease) or lease.left < 20:
        now += 0.0001
        one.passes(["global_"], now)
    held, now = lease.left, lease.until - 0.0001  # the bucket has had the time to fill up

    admitted = 0
    while other.passes(["global_"], now):
        admitted += 1
    while one.passes(["global_"], now):
        admitted += 1

    assert 5000 - 2 * held - 50 <= admitted <= 5000


def test_of_the_lower_half_of_a_bucket_nothing_is_leased() -> None:
    bucket = TokenBucket(1000, 1000)
    bucket.spend(0.0, 501)

    assert bucket.lease_out(100, 0.0) == 0

    upper = TokenBucket(1000, 1000)
    upper.spend(0.0, 100)
    assert upper.lease_out(100, 0.0) == 50
    assert upper.lease_out(100, 0.0) == 43
