"""When a gateway goes by what it knows, because the store cannot be asked."""

from __future__ import annotations

import attrs
import trio
import trio.testing

from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.board import Statement
from citadel_gateway.policy.rate_limit import Allowance, TokenBucket
from tests.support.memory_store import Memory, MemoryStore

PATIENCE = 0.02


@attrs.define(eq=False)
class Member:
    store: MemoryStore
    told: list[bool]
    membership: Membership

    def take(self) -> bool:
        bucket = TokenBucket(rate=100.0, burst=100.0)
        bucket.key = b"all"
        return isinstance(self.membership.take_nowait([("all", bucket)]), Allowance)


async def member() -> Member:
    """It has met the others."""
    store, told = MemoryStore(Memory()), list[bool]()
    membership = Membership(
        store=store,
        lease=3.0,
        patience=PATIENCE,
        members=2,
        on_change=lambda is_alone, _: told.append(is_alone),
    )
    await membership.meet()
    store.is_out = True
    return Member(store, told, membership)


async def test_requests_that_miss_by_one_standstill_do_not_make_it_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one = await member()

    passed = [one.take() for _ in range(10)]
    one.store.is_out = False
    await trio.sleep(3 * PATIENCE)
    one.take()
    one.store.is_out = True
    passed += [one.take() for _ in range(10)]

    assert all(passed)
    assert not one.membership.is_alone
    assert one.told == []


async def test_it_is_alone_after_three_misses_one_after_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one = await member()
    alone = []

    for _ in range(3):
        assert one.take()
        alone.append(one.membership.is_alone)
        await trio.sleep(PATIENCE)

    assert alone == [False, False, True]
    assert one.told == [True]


async def test_members_are_not_fewer_because_the_store_has_forgotten_them(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one = await member()
    one.store.is_out = False
    for name in ("second", "third"):
        await one.store.meet(Statement(member=name, lease=3.0))
    await one.membership.meet()

    one.store.memory.forget_all()
    counted = []
    for _ in range(5):
        await one.membership.meet()
        counted.append(one.membership.members)
        await trio.sleep(1.0)

    assert counted == [3, 3, 3, 1, 1]
