"""Many gateways on a store a round trip away, as `bench.fleet` measures them, at a small size."""

from __future__ import annotations

import pytest
from bench.fleet import scenarios
from trio.testing import MockClock


@pytest.mark.parametrize("seed", range(2))
async def test_a_rate_limit_is_that_of_one_bucket(seed: int, autojump_clock: MockClock) -> None:
    found = await scenarios.limits(8, rate=50.0, seconds=10, seed=seed)

    assert found["excess"] < 1
    assert abs(found["admitted"] - found["exact"]) <= 1
    assert abs(found["most_over_percent"]) <= 2  # one request of fifty: those on their way
    assert abs(found["most_under_percent"]) <= 2


@pytest.mark.parametrize("seed", range(2))
async def test_a_cap_holds_while_answers_are_on_their_way(
    seed: int, autojump_clock: MockClock
) -> None:
    found = await scenarios.caps(6, 20, demand=1.3, seconds=10, service=0.2, seed=seed)

    assert found["most"] == 20
    assert found["unused_while_waiting_percent"] < 3


async def test_a_cap_holds_while_gateways_come_go_and_die(autojump_clock: MockClock) -> None:
    found = await scenarios.churn(6, 20, seconds=18)

    assert found["most"] == 20
    assert found["excess"] < 1


async def test_what_one_gives_back_others_have_at_once_where_there_is_little(
    autojump_clock: MockClock,
) -> None:
    found = [await scenarios.caps(5, 50, demand=0.75, seconds=30, seed=n) for n in range(3)]

    assert max(each["most"] for each in found) <= 50
    # By chance alone, somebody reports every second: then none of eight seeds is below 180.
    assert min(each["wait_p99_ms"] for each in found) < 100


async def test_many_who_wait_do_not_ask_more_than_a_few(autojump_clock: MockClock) -> None:
    found = await scenarios.caps(30, 30, demand=1.5, seconds=9)

    assert found["calls_per_s"]["report"] < 900  # every 20 ms each it would be 1 500


async def test_without_a_store_all_together_keep_a_limit_smaller_than_they_are_many(
    autojump_clock: MockClock,
) -> None:
    found = await scenarios.away(12, rate=4.0, burst=4, offered=6.0)

    assert found["alone"] == 12
    assert found["meanwhile"]["admitted"] <= found["meanwhile"]["exact"] + 4
    assert found["after"]["off_percent"] == pytest.approx(0, abs=3)


async def test_a_store_that_forgets_all_lets_nobody_have_more(autojump_clock: MockClock) -> None:
    found = await scenarios.away(5, rate=50.0, how="forgets")

    assert found["alone"] == 0
    assert found["excess"] < 3


async def test_all_know_of_an_open_breaker_by_their_next_meeting(
    autojump_clock: MockClock,
) -> None:
    found = await scenarios.breaker(8, rounds=5)

    assert found["max_s"] < 0.6


async def test_what_a_dead_gateway_did_and_had_is_others_after_its_lease(
    autojump_clock: MockClock,
) -> None:
    found = await scenarios.death(6, 30, rounds=3)

    assert found["shares_back"]["max_s"] < 3.6
    assert found["another_probes"]["max_s"] < 3.6


async def test_endpoints_are_probed_once_however_many_gateways_there_are(
    autojump_clock: MockClock,
) -> None:
    one, several = await scenarios.idle(1, 3, 90), await scenarios.idle(5, 3, 90)

    for found in (one, several):
        assert 0.7 < found["probes_per_endpoint_and_interval"] < 1.2
    assert several["calls_per_s"]["meet"] == pytest.approx(5 * one["calls_per_s"]["meet"], rel=0.1)


async def test_a_seed_says_everything(autojump_clock: MockClock) -> None:
    one = await scenarios.caps(4, 10, demand=1.2, seconds=10, seed=7)

    assert await scenarios.caps(4, 10, demand=1.2, seconds=10, seed=7) == one
