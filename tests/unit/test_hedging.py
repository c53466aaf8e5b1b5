"""When a second endpoint is asked: what is measured, and what is made of it."""

from __future__ import annotations

import random

import pytest

from citadel_gateway.policy.hedging import FirstTokens, Hedging


def hedging(*seconds: float, at: float = 0.0) -> Hedging:
    found = Hedging()
    for each in seconds:
        found.measured(each, at)
    return found


def test_nothing_is_hedged_before_there_are_twenty_samples() -> None:
    few = hedging(*[1.0] * 19)

    assert few.after(0.0) is None
    few.measured(1.0, 0.0)
    assert few.after(0.0) == 1.0


def test_one_in_twenty_takes_longer() -> None:
    lengths = [n / 10 for n in range(1, 101)]
    random.Random(1).shuffle(lengths)

    assert hedging(*lengths).after(0.0) == 9.5


def test_a_very_fast_model_is_hedged_no_sooner_than_after_fifty_milliseconds() -> None:
    assert hedging(*[0.001] * 50).after(0.0) == 0.05


def test_the_time_can_be_fixed() -> None:
    assert Hedging(fixed=0.02).after(0.0) == 0.02


def test_samples_of_five_minutes_count() -> None:
    found = hedging(*[9.0] * 20, at=0.0)
    for _ in range(20):
        found.measured(1.0, 200.0)

    assert found.after(299.0) == 9.0
    assert found.after(300.0) == 1.0
    assert found.after(500.0) is None


def test_the_last_five_hundred_samples_count() -> None:
    found = hedging(*[9.0] * 500)
    for _ in range(475):
        found.measured(1.0, 1.0)
    assert found.after(1.0) == 1.0

    other = hedging(*[9.0] * 500)
    for _ in range(474):
        other.measured(1.0, 1.0)
    assert other.after(1.0) == 9.0


def test_who_was_overtaken_counts_as_slower_than_all_others() -> None:
    found = hedging(*[1.0] * 10, *[2.0] * 9, 3.0)
    assert found.after(0.0) == 2.0

    found.overtaken(0.0)

    assert found.after(0.0) == 3.0


def test_hedges_that_win_do_not_lower_the_time() -> None:
    """Whoever takes longer than the quantile is overtaken, so its time is never known."""
    rng, found = random.Random(7), Hedging()
    after = None
    for _ in range(3000):
        takes = rng.expovariate(1.0) + 0.1
        after = found.after(0.0)
        if after is not None and takes > after:
            found.overtaken(0.0)
        else:
            found.measured(takes, 0.0)

    assert after == pytest.approx(3.1, rel=0.2)


def test_an_endpoint_that_hangs_does_not_raise_the_time_beyond_what_was_measured() -> None:
    rng, found = random.Random(7), Hedging()
    for _ in range(3000):
        if rng.random() < 0.25:
            found.overtaken(0.0)
        else:
            found.measured(rng.uniform(0.1, 0.5), 0.0)

    assert found.after(0.0) == pytest.approx(0.5, abs=0.01)


def test_where_nothing_was_measured_nothing_is_hedged() -> None:
    found = Hedging()
    for _ in range(30):
        found.overtaken(0.0)

    assert found.after(0.0) is None


def test_a_new_configuration_goes_on_with_what_was_measured() -> None:
    new = Hedging()
    new.take_over(hedging(*[1.0] * 20))

    assert new.after(0.0) == 1.0


def test_the_quantile_is_that_of_a_sorted_list() -> None:
    rng, seen, lengths = random.Random(3), FirstTokens(), list[float]()
    for n in range(700):
        length = rng.choice([0.1, 0.2, rng.random()])
        seen.add(length, float(n) / 10)
        lengths = [*lengths, length][-500:]
        if len(lengths) >= 20:
            assert seen.quantile(n / 10) == sorted(lengths)[-(-len(lengths) * 95 // 100) - 1]
