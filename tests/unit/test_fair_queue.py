"""Requests of one class, by tenant; checked against plain lists."""

from __future__ import annotations

import random

import pytest

from citadel_gateway.policy.fair_queue import FairQueue
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.virtual_tokens import Account


def filled(**lengths: int) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for tenant, length in lengths.items():
        for i in range(length):
            queue.push(Party(tenant), f"{tenant}{i}")
    return queue


def serve(queue: FairQueue[str], cost: float = 1.0) -> str:
    account, item = queue.first()
    queue.serve(account, item)
    account.charge(cost)
    return item


def test_tenants_take_turns_and_each_ones_first_come_is_first_served() -> None:
    queue = filled(a=4, b=2)

    assert [serve(queue) for _ in range(6)] == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert (queue.depth, queue.longest(), queue.tenants()) == (0, 0, 0)
    with pytest.raises(LookupError):
        queue.first()


@pytest.mark.parametrize(
    ("lengths", "tenant", "ahead"),
    [
        ({}, "new", 0),
        ({"flood": 100}, "new", 1),
        ({"flood": 100}, "flood", 100),
        ({"flood": 100, "b": 3}, "b", 3 + 4),
        ({"flood": 100, "b": 3, "c": 1}, "b", 3 + 4 + 1),
        ({"a": 1, "b": 1, "c": 1}, "new", 3),
    ],
)
def test_a_place_in_line_is_that_of_the_tenant(
    lengths: dict[str, int], tenant: str, ahead: int
) -> None:
    queue = filled(**lengths)

    assert queue.ahead_of(Party(tenant)) == ahead

    queue.push(Party(tenant), "it")
    before = 0
    while serve(queue) != "it":
        before += 1
    assert abs(before - ahead) <= len(lengths)


def test_a_heavier_tenant_is_sooner_in_its_place() -> None:
    queue: FairQueue[int] = FairQueue()
    light, heavy = Party("light"), Party("heavy", 4.0)
    for i in range(100):
        queue.push(light, i)
        queue.push(heavy, i + 100)

    assert queue.ahead_of(heavy) == pytest.approx(100 + 101 / 4, abs=40)
    assert queue.ahead_of(light) == 200  # all of both


def test_the_newest_of_the_longest_is_found_whoever_comes_and_goes() -> None:
    rng = random.Random(1)
    queue: FairQueue[int] = FairQueue()
    plain: dict[str, list[int]] = {}
    accounts: dict[int, Account] = {}
    for i in range(4000):
        tenant = rng.choice("abcdef")
        if rng.random() < 0.55 or not any(plain.values()):
            accounts[i] = queue.push(Party(tenant), i)
            plain.setdefault(tenant, []).append(i)
        elif rng.random() < 0.5:
            account, item = queue.first()
            queue.serve(account, item)
            account.charge(rng.randint(1, 9))
            owner = next(own for own in plain.values() if item in own)
            assert owner[0] == item
            owner.remove(item)
        else:
            gone = rng.choice([item for own in plain.values() for item in own])
            queue.remove(accounts[gone], gone)
            next(own for own in plain.values() if gone in own).remove(gone)

        longest = max(map(len, plain.values()))
        assert queue.depth == sum(map(len, plain.values()))
        assert queue.longest() == longest
        assert {t: queue.length_of(t) for t in plain} == {t: len(o) for t, o in plain.items()}
        if longest:
            assert queue.newest_of_longest() in {o[-1] for o in plain.values() if len(o) == longest}
    assert queue.tenants() == sum(bool(own) for own in plain.values())
