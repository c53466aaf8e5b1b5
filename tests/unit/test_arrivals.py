"""What leads from one list of endpoints to the next."""

from __future__ import annotations

from citadel_gateway.policy.arrivals import Arrivals, compare


def test_who_comes_who_goes_and_who_is_another_is_told_in_order() -> None:
    found = compare({"a": 1, "b": 1, "c": 1, "d": 1}, {"e": 1, "c": 2, "b": 1, "f": 1})

    assert found == Arrivals(come=("e", "f"), gone=("a", "d"), changed=("c",))


def test_nothing_leads_from_a_list_to_itself_in_another_order() -> None:
    assert compare({"a": 1, "b": 2}, {"b": 2, "a": 1}) == Arrivals((), (), ())
