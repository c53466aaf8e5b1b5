"""Short versions of what `python -m tests.many` does for minutes; Redis here, LMDB there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.many import caps, deaths, limits, soak
from tests.many.fleet import Shape
from tests.many.report import Finding, table
from tests.support.redis_server import RedisServer, running_redis


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def assert_kept(findings: list[Finding]) -> None:
    assert all(each.is_kept for each in findings), "\n" + table(findings)


async def test_keys_have_their_limits_over_all_workers_of_all_gateways(
    tmp_path: Path, redis: RedisServer
) -> None:
    shape = Shape(2, gateways=2)

    assert_kept(await limits.one_for_each_key(tmp_path, redis, shape, 2.0, patience=2.0, least=0.8))


async def test_engines_count_no_more_than_the_cap_of_four_workers(
    tmp_path: Path, redis: RedisServer
) -> None:
    assert_kept(await caps.one_for_all(tmp_path, redis, Shape(4), 2.0, patience=2.0, least=0.5))


async def test_workers_that_are_killed_cost_their_own_connections_and_no_count(
    tmp_path: Path, redis: RedisServer
) -> None:
    assert_kept(
        await deaths.one_after_the_other(tmp_path, redis, seconds=4.0, pause=0.5, clients=30)
    )


async def test_under_load_one_thing_after_the_other_breaks_and_all_heals(
    tmp_path: Path, redis: RedisServer
) -> None:
    shape = Shape(2, gateways=2)

    assert_kept(await soak.run(tmp_path, redis, shape, 10.5, seed=936, patience=0.2, least=0.5))
