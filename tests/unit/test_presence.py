"""Whoever looks at one host's status sees which others share its store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import MockClock

from citadel_gateway.app.presence import Presence
from citadel_gateway.cli.status import status_table
from citadel_gateway.io.store.membership import Membership
from tests.support.fellows import fellows
from tests.support.gateway import fleet
from tests.support.memory_store import Memory, MemoryStore


@asynccontextmanager
async def host(memory: Memory, name: str, workers: int) -> AsyncIterator[Presence]:
    """It is there for as long as the body takes."""
    store = MemoryStore(memory)
    membership = Membership(store, 2.0, 0.02, workers, lambda *_: None)
    presence = Presence(membership, workers, name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        nursery.start_soon(membership.run)
        nursery.start_soon(presence.run)
        yield presence
        nursery.cancel_scope.cancel()


async def test_every_host_knows_of_every_other_one(autojump_clock: MockClock) -> None:
    memory = Memory()
    async with host(memory, "a", 4) as a, host(memory, "c", 1) as c, host(memory, "b", 2) as b:
        await trio.sleep(15)

        names = [[each["host"] for each in one.report()] for one in (a, b, c)]
        workers = {each["host"]: each["workers"] for each in b.report()}

    assert names == [["a", "b", "c"], ["b", "a", "c"], ["c", "a", "b"]]
    assert workers == {"a": 4, "b": 2, "c": 1}


async def test_a_host_of_which_nothing_is_heard_any_more_is_gone(autojump_clock: MockClock) -> None:
    memory = Memory()
    async with host(memory, "a", 4) as a:
        async with host(memory, "b", 4):
            await trio.sleep(12)
        await trio.sleep(20)
        [_, b] = a.report()
        await trio.sleep(20)
        left = a.report()

    assert 20 <= b["seen_seconds_ago"] <= 32
    assert [each["host"] for each in left] == ["a"]


async def test_several_processes_of_a_host_are_one_host(autojump_clock: MockClock) -> None:
    memory = Memory()
    async with host(memory, "a", 2) as one, host(memory, "a", 2) as other:
        await trio.sleep(15)

        assert one.report() == other.report()
        assert one.report() == [{"host": "a", "workers": 2, "seen_seconds_ago": 0.0}]


async def test_the_status_of_a_gateway_with_a_store_shows_its_host(
    autojump_clock: MockClock,
) -> None:
    async with fellows(fleet({"m": ["a"]}), 2, ["a"]) as worlds:
        report = worlds[0].service.reports.status(trio.current_time(), None)

    [shown] = report["hosts"]
    assert shown["seen_seconds_ago"] == 0.0


def test_the_table_names_the_hosts_if_there_are_several() -> None:
    report: dict[str, Any] = {
        "gateway": "g", "status": "healthy", "models": {}, "waiting_for_any_model": 0,
        "limits": {"in_flight": 0, "max_concurrent_requests": 1},
        "hosts": [{"host": "gpu-1"}, {"host": "gpu-2"}],
    }  # fmt: skip

    assert "2 hosts: gpu-1, gpu-2" in str(status_table(report).caption)
    report["hosts"] = report["hosts"][:1]
    assert "host" not in str(status_table(report).caption)
