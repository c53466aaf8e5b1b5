"""What the workers of a host may do adds up to what the host may do."""

from __future__ import annotations

from typing import Any

import pytest

from citadel_gateway.config.loader import parse
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.share import share_of
from citadel_gateway.config.values import Name


def config(**sections: Any) -> GatewayConfigSchema:
    models = {
        "m": {
            "max_concurrent": 10,
            "endpoints": [{"url": "http://a", "max_concurrent": 7}, {"url": "http://b"}],
        }
    }
    key = {"id": "k", "sha256": "0" * 64, "rate_limit_rps": 3}
    shared = {"store": {"kind": "memory"}}
    return parse({"models": models, "security": {"api_keys": [key]}, **shared, **sections})


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_shares_add_up_exactly(workers: int) -> None:
    whole = config(performance={"client_rate_limit_rps": 2, "rate_limit_burst": 101})
    parts = [share_of(whole, place, workers) for place in range(workers)]

    performances = [part.performance for part in parts]
    assert sum(p.max_concurrent_requests for p in performances) == 100
    assert sum(p.rate_limit_rps for p in performances) == pytest.approx(50)
    assert sum(p.memory_limit_gb for p in performances) == pytest.approx(2)
    assert sum(p.rate_limit_burst or 0 for p in performances) == 101
    assert sum(p.client_rate_limit_burst or 0 for p in performances) == 10
    assert sum(part.load_balancer.queue_size for part in parts) == 100
    assert sum(part.service.max_connections for part in parts) == 4096
    assert sum(part.security.api_keys[0].rate_limit_burst or 0 for part in parts) == 15
    for place, most in enumerate((7, 10)):
        endpoints = [part.models[Name("m")].all_endpoints()[place] for part in parts]
        assert sum(e.max_concurrent or 0 for e in endpoints) == most


def test_a_limit_below_the_number_of_workers_leaves_nobody_without_any() -> None:
    whole = config(performance={"max_concurrent_requests": 2}, load_balancer={"queue_size": 2})
    parts = [share_of(whole, place, 4) for place in range(4)]

    assert [part.performance.max_concurrent_requests for part in parts] == [1, 1, 1, 1]
    assert [part.load_balancer.queue_size for part in parts] == [1, 1, 0, 0]


def test_everything_else_is_the_same_for_all() -> None:
    whole = config()
    part = share_of(whole, 0, 4)

    assert (part.gateway, part.streaming, part.monitoring) == (
        whole.gateway, whole.streaming, whole.monitoring,
    )  # fmt: skip
    assert part.workers == whole.workers


def test_as_many_workers_as_cores_unless_it_is_said() -> None:
    assert config().workers == 4
    assert config(performance={"cpu_cores": 2}).workers == 2
    assert config(performance={"cpu_cores": 2}, service={"workers": 3}).workers == 3


def test_a_worker_may_hold_the_largest_body_whatever_its_share() -> None:
    whole = config(performance={"max_body_bytes": 1000, "max_buffered_bytes": 2400})
    parts = [share_of(whole, place, 4) for place in range(4)]

    assert [part.performance.max_buffered_bytes for part in parts] == [1000] * 4
    assert share_of(whole, 0, 2).performance.max_buffered_bytes == 1200


def test_what_a_store_divides_is_left_whole() -> None:
    whole = config(store={"kind": "auto"})
    part = share_of(whole, 1, 4)

    assert part.models == whole.models
    assert part.security == whole.security
    assert part.performance.max_concurrent_requests == 100
    assert float(part.performance.rate_limit_rps) == 50
    assert part.performance.memory_limit_gb == 0.5
    assert (part.load_balancer.queue_size, part.service.max_connections) == (25, 1024)


def test_there_is_room_to_wait_for_a_share_of_a_cap() -> None:
    whole = config(store={"kind": "auto"}, load_balancer={"queue_size": 2})

    assert [share_of(whole, n, 4).load_balancer.queue_size for n in range(4)] == [1, 1, 1, 1]
