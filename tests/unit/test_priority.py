from __future__ import annotations

import pytest

from citadel_gateway.policy.priority import CLASSES, NAMES, RANKS, Priority, rank_named


def test_the_classes_go_from_the_most_urgent_to_the_least() -> None:
    assert NAMES == ("system", "interactive", "default", "bulk")
    assert [RANKS[each] for each in CLASSES] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "priority"),
    [
        (b"system", Priority.SYSTEM),
        (b"BULK", Priority.BULK),
        (b" Interactive ", Priority.INTERACTIVE),
        (b"urgent", Priority.DEFAULT),
        (b"", Priority.DEFAULT),
        (b"\xff", Priority.DEFAULT),
    ],
)
def test_a_class_is_named_in_any_case_and_an_unknown_one_is_the_default(
    name: bytes, priority: Priority
) -> None:
    assert rank_named(name) == RANKS[priority]
