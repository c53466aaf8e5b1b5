"""What one configuration hands to the next, piece by piece."""

from __future__ import annotations

import ssl

import pytest

from citadel_gateway.cli.status import status_table
from citadel_gateway.config.schema import TlsConfig
from citadel_gateway.io.dial import Dialer, make_tls_contexts
from citadel_gateway.io.resolver import Resolver
from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, State, Verdict
from citadel_gateway.policy.rate_limit import ClientBuckets, TokenBucket


def spent(rate: float, burst: float, cost: float, now: float = 100.0) -> TokenBucket:
    bucket = TokenBucket(rate, burst)
    bucket.spend(now, cost)
    return bucket


@pytest.mark.parametrize(
    ("rate", "burst", "left"),
    [
        (2, 10, 4),  # the same: the level stays
        (8, 10, 4),
        (2, 3, 3),  # a smaller one cannot hold more than its size
        (2, 100, 4),  # a larger one begins with what there is
        (0.5, 20, 4),
    ],
)
def test_a_bucket_holds_what_the_one_before_did(rate: float, burst: float, left: int) -> None:
    bucket = TokenBucket(rate, burst)

    bucket.take_over(spent(2, 10, cost=6), 100.0)

    assert bucket.allowance(100.0).remaining == left
    assert bucket.allowance(100.0 + (burst - left) / rate).remaining == burst


def test_a_full_bucket_stays_full() -> None:
    bucket = TokenBucket(2, 10)
    bucket.take_over(TokenBucket(2, 10), 100.0)

    assert bucket.is_full(100.0)


def test_each_client_keeps_its_own_level() -> None:
    before, after = ClientBuckets(1, 5), ClientBuckets(1, 5)
    before.of("busy", 100.0).spend(100.0, 4)
    before.of("idle", 100.0)

    after.take_over(before, 100.0)

    assert len(after) == 1
    assert after.of("busy", 100.0).allowance(100.0).remaining == 1
    assert after.of("idle", 100.0).allowance(100.0).remaining == 5


def test_a_breaker_goes_by_new_numbers_and_forgets_nothing() -> None:
    breaker = CircuitBreaker(BreakerPolicy(threshold=5, rest=10), lambda: 0.5)
    for _ in range(3):
        permit = breaker.admit(0.0)
        assert permit is not None
        breaker.settle(permit, Verdict.BAD, 0.0)

    breaker.renew(BreakerPolicy(threshold=4, rest=20, window=60))
    permit = breaker.admit(1.0)
    assert permit is not None
    breaker.settle(permit, Verdict.BAD, 1.0)

    assert breaker.state(20.9) is State.OPEN
    assert breaker.state(21.0) is State.HALF_OPEN


def test_new_connections_use_the_files_as_they_are_now() -> None:
    skip, named = TlsConfig(insecure_skip_verify=True), TlsConfig(server_name="other")
    dialer = Dialer()
    first, usual = dialer.context_for(skip), dialer.context_for(None)

    dialer.renew(make_tls_contexts([None, named]))

    assert dialer.context_for(None) is dialer.context_for(named) is not usual
    assert dialer.context_for(skip) is first  # of requests that began with it
    dialer.renew(make_tls_contexts([None]))
    assert dialer.context_for(skip) is not first


def test_contexts_are_made_once_for_each_setting() -> None:
    contexts = make_tls_contexts([None, TlsConfig(), TlsConfig(server_name="other")])

    assert len({*contexts.values()}) == 1
    assert all(isinstance(context, ssl.SSLContext) for context in contexts.values())


async def test_names_that_nobody_uses_any_more_are_forgotten() -> None:
    async def lookup(host: str) -> list[str]:
        return [f"10.0.0.{len(host)}"]

    resolver = Resolver(lookup=lookup)
    for host in ("a", "bb"):
        await resolver.addresses(host)
    resolver.forget_others({"bb"})

    assert (resolver.known("a"), resolver.known("bb")) == ((), ("10.0.0.2",))
    assert await resolver.addresses("a") == ("10.0.0.1",)


def test_the_status_table_says_why_the_file_is_not_in_use() -> None:
    report = {
        "gateway": "g", "status": "healthy", "models": {}, "waiting_for_any_model": 0,
        "limits": {"in_flight": 0, "max_concurrent_requests": 1},
        "configuration": {
            "generation": 3, "since": "2031-02-03T04:05:06.7+00:00",
            "refused": {"problems": ["models: [x] is wrong"]},
        },
    }  # fmt: skip

    caption = str(status_table(report).caption)

    assert "configuration 3, since 2031-02-03T04:05:06 UTC" in caption
    assert r"\[x] is wrong" in caption
