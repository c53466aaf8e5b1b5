"""Whose turn it is, by what each was served."""

from __future__ import annotations

import random
from collections import Counter

from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.virtual_tokens import Account, Counters


def serve(counters: Counters, tokens: float = 1.0) -> str:
    """The next one has its turn, which ends at once; whoever it is has more waiting."""
    account = counters.lowest()
    assert account is not None
    tenant = next(t for t, a in counters._accounts.items() if a is account)
    counters.join(Party(tenant, account.weight))
    counters.serve(account)
    account.charge(tokens / account.weight)
    account.finish(tokens / account.weight)
    return str(tenant)


def joined(counters: Counters, *tenants: str) -> list[Account]:
    return [counters.join(Party(tenant)) for tenant in tenants]


def test_equals_take_turns_in_the_order_in_which_they_came() -> None:
    counters = Counters()
    joined(counters, "a", "b", "c")

    assert [serve(counters) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_whose_turns_cost_more_has_fewer_of_them() -> None:
    counters, used = Counters(), Counter[str]()
    joined(counters, "dear", "cheap")
    for _ in range(1100):
        account = counters.lowest()
        cost = 100.0 if account is counters.of("dear") else 10.0
        used[serve(counters, cost)] += int(cost)

    assert abs(used["dear"] - used["cheap"]) <= 100


def test_weights_are_shares() -> None:
    counters = Counters()
    counters.join(Party("a", 3.0))
    counters.join(Party("b", 1.0))

    turns = Counter(serve(counters) for _ in range(400))

    assert turns == {"a": 300, "b": 100}


def test_who_stayed_away_has_saved_nothing_up() -> None:
    counters = Counters()
    joined(counters, "busy")
    for _ in range(50):
        serve(counters)
    joined(counters, "new")

    assert [serve(counters) for _ in range(5)] == ["new", "busy", "new", "busy", "new"]


def test_who_stayed_away_while_nobody_waited_has_saved_nothing_up_either() -> None:
    counters = Counters()
    (busy,) = joined(counters, "busy")
    for _ in range(50):
        serve(counters)
    counters.quit(busy)
    joined(counters, "new", "busy")

    assert [serve(counters) for _ in range(4)] == ["new", "busy", "new", "busy"]


def test_a_newcomer_has_as_much_under_way_as_the_others_before_those_have_more() -> None:
    counters = Counters()
    (flood,) = joined(counters, "flood")
    for _ in range(50):
        serve(counters)
    for _ in range(3):  # and these are being worked on
        joined(counters, "flood")
        counters.serve(flood)
        flood.charge(1.0)
    joined(counters, "new")

    assert [serve(counters) for _ in range(6)] == ["new", "new", "new", "flood", "new", "flood"]


def test_a_newcomer_does_not_wait_for_another_turn_of_who_never_stops() -> None:
    counters = Counters()
    joined(counters, "flood", "flood", "flood")
    serve(counters)
    (light,) = joined(counters, "light")
    assert serve(counters) == "light"
    counters.quit(light)
    serve(counters)
    joined(counters, "light")

    assert serve(counters) == "light"


def test_what_was_really_used_counts_in_the_end() -> None:
    counters = Counters()
    a, b = joined(counters, "a", "b")
    serve(counters, 10.0)
    serve(counters, 10.0)
    a.charge(35.0)
    assert [serve(counters, 10.0) for _ in range(4)] == ["b", "b", "b", "b"]

    b.charge(-25.0)

    assert [serve(counters, 10.0) for _ in range(2)] == ["b", "b"]
    assert serve(counters, 10.0) == "a"


def test_answers_are_expected_to_be_as_long_as_the_last_ones() -> None:
    (account,) = joined(Counters(), "a")
    account.learn(100)
    assert account.answers == 100
    for _ in range(20):
        account.learn(500)

    assert 490 < account.answers < 500


def test_of_ever_new_tenants_only_a_bounded_number_is_remembered() -> None:
    counters = Counters()
    joined(counters, "stays")
    for i in range(5000):
        counters.quit(counters.join(Party(f"t{i}")))

    assert len(counters) < 1100
    assert len(counters._line) < 200
    assert counters.of("stays") is not None


def test_nobody_who_always_has_more_waiting_gets_ahead_of_another_by_more_than_a_turn() -> None:
    rng = random.Random(3)
    for _ in range(30):
        counters, used, dearest = Counters(), Counter[str](), 64
        joined(counters, *"abcd")
        for _ in range(500):
            cost = rng.randint(1, dearest)
            used[serve(counters, cost)] += cost
        assert max(used.values()) - min(used.values()) <= dearest
