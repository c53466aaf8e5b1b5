"""A worker that dies is replaced at once; one that keeps dying, ever later."""

from __future__ import annotations

from citadel_gateway.policy.respawn import Respawn


def test_the_first_death_costs_no_pause_and_the_next_ones_double() -> None:
    respawn = Respawn(pause=0.5, longest=3)

    assert [respawn.died(lived=1) for _ in range(6)] == [0, 0.5, 1, 2, 3, 3]


def test_who_lived_long_is_replaced_at_once_again() -> None:
    respawn = Respawn()
    for _ in range(5):
        respawn.died(lived=1)

    assert [respawn.died(lived=60), respawn.died(lived=1)] == [0, 0.5]


def test_no_number_of_deaths_is_too_large() -> None:
    respawn = Respawn(longest=30)

    assert [respawn.died(lived=0) for _ in range(5000)][-1] == 30
