"""A cap that several keep together is never exceeded, never wasted, and nobody is left out."""

from __future__ import annotations

import random
from collections import deque

import attrs
import pytest

from citadel_gateway.policy.shares import GRACE, Cap, Grant, Need

LEASE = 3.0


@attrs.define
class Member:
    """What a gateway does with its share: it begins what it may, and reports now and then.

    The answer may take its time; until it is there, the one before holds.
    """

    name: str
    limit: int | None = None
    answer: Grant | None = None  # on its way
    waiting: deque[float] = attrs.field(factory=deque)  # since when
    running: list[float] = attrs.field(factory=list)  # until when
    waits: list[float] = attrs.field(factory=list)

    def go_on(self, now: float, service: float) -> None:
        self.running = [end for end in self.running if end > now]
        while self.waiting and len(self.running) < (self.limit or 0):
            self.waits.append(now - self.waiting.popleft())
            self.running.append(now + service)

    def report(self, cap: Cap, size: int, now: float) -> bool:
        need = Need(size, self.limit, len(self.running), len(self.waiting))
        self.answer = cap.report(self.name, need, LEASE, now)
        return self.answer.is_contended

    def hear(self) -> None:
        if self.answer is not None:
            self.limit, self.answer = self.answer.limit, None


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_asked_for_the_cap_holds_and_everybody_is_served(seed: int) -> None:
    rng = random.Random(seed)
    size, members = rng.randint(1, 12), [Member(f"m{i}") for i in range(rng.randint(1, 5))]
    cap, service, step = Cap(), rng.choice([0.05, 0.5]), 0.01
    work = int(10 * size / service)  # ten seconds', in forty
    for tick in range(4000):
        now = tick * step
        for member in rng.sample(members, len(members)):
            if tick < 2000 and work > 4 and rng.random() < 0.1:
                member.waiting.extend([now] * rng.randint(1, 4))
                work -= 4
            member.go_on(now, service)
            if member.answer is not None:
                if rng.random() < 0.7:
                    member.hear()
                    member.go_on(now, service)
            elif rng.random() < 0.5:
                member.report(cap, size, now)
            assert sum(len(m.running) for m in members) <= size
        if tick > 2000 and not any(m.waiting or m.running for m in members):
            break
        if tick == 2000 and rng.random() < 0.3:
            cap = Cap()  # lost

    else:
        pytest.fail("some have never been served")


def test_with_one_slot_those_who_wait_take_turns() -> None:
    cap, members = Cap(), [Member("a"), Member("b"), Member("c")]
    order = []
    for member in members:
        member.waiting.extend([0.0] * 10)
    for tick in range(1, 200):
        for late, member in enumerate(members):
            now = tick * 0.1 + late * 0.001
            before = len(member.waits)
            member.go_on(now, 0.35)
            member.report(cap, 1, now)
            member.hear()
            member.go_on(now, 0.35)
            if len(member.waits) > before:
                order.append(member.name)

    assert len(order) == 30
    for i in range(0, 27, 3):
        assert set(order[i : i + 3]) == {"a", "b", "c"}


def test_who_needs_little_gets_it_all_and_the_rest_is_shared_evenly() -> None:
    cap = Cap()
    for _ in range(2):
        grants = {
            name: cap.report(name, Need(10, None, 0, wants), LEASE, 0.0)
            for name, wants in [("little", 1), ("much", 20), ("more", 30)]
        }
    for _ in range(2):  # they have begun nothing yet, and give back what is too much
        grants = {
            name: cap.report(name, Need(10, 0, 0, wants), LEASE, 0.0)
            for name, wants in [("little", 1), ("much", 20), ("more", 30)]
        }

    assert {name: grant.limit for name, grant in grants.items()} in (
        {"little": 1, "much": 5, "more": 4},
        {"little": 1, "much": 4, "more": 5},
    )


def test_what_somebody_may_begin_until_he_hears_is_nobody_elses() -> None:
    cap = Cap()
    cap.report("one", Need(10, None, 0, 10), LEASE, 0.0)
    cap.report("one", Need(10, 10, 2, 0), LEASE, 0.0)
    asked = cap.report("other", Need(10, None, 0, 8), LEASE, 0.0)

    assert asked == Grant(limit=0, held=0, is_contended=False)
    cap.report("one", Need(10, 6, 2, 0), LEASE, 0.0)  # he has heard by now
    assert cap.report("other", Need(10, 0, 0, 8), LEASE, 0.0).limit == 4


def test_in_quiet_times_there_is_some_to_spare_for_everybody_and_for_the_next() -> None:
    cap = Cap()
    for name in ("a", "b"):
        cap.report(name, Need(100, None, 2, 0), LEASE, 0.0)
    limits = [cap.report(name, Need(100, 0, 2, 0), LEASE, 0.0).limit for name in ("a", "b")]

    assert limits == [26, 26]
    assert cap.report("c", Need(100, None, 0, 40), LEASE, 0.0).limit == 48


def test_after_a_loss_what_is_in_use_counts_before_anybody_gets_more() -> None:
    cap = Cap()  # which has lost everything
    quick = cap.report("quick", Need(10, 5, 5, 5), LEASE, 100.0)
    cap.report("slow", Need(10, 5, 5, 0), LEASE, 100.0 + GRACE / 2)

    assert quick.limit == 5
    assert cap.report("quick", Need(10, 5, 5, 5), LEASE, 100.0 + 2 * GRACE).limit == 5


def test_who_reports_first_after_a_silence_of_all_does_not_get_what_others_may_still_use() -> None:
    cap = Cap()
    cap.report("busy", Need(4, None, 0, 4), LEASE, 100.0)
    cap.report("idle", Need(4, None, 0, 0), LEASE, 100.0 + LEASE / 4)
    back = 100.0 + LEASE * 1.1

    assert cap.report("idle", Need(4, 0, 0, 4), LEASE, back).limit == 0
    assert cap.report("busy", Need(4, 2, 2, 2), LEASE, back).limit == 2
    assert cap.report("idle", Need(4, 0, 0, 4), LEASE, back + GRACE).limit == 2


def test_whoever_has_stayed_gets_what_the_dead_had() -> None:
    cap = Cap()
    cap.report("dead", Need(4, None, 0, 4), LEASE, 100.0)
    for quarter in range(4):
        cap.report("alive", Need(4, 0, 0, 0), LEASE, 100.0 + quarter * LEASE / 4)

    assert cap.report("alive", Need(4, 0, 0, 4), LEASE, 100.0 + LEASE).limit == 4
