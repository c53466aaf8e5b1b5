"""Who holds the fewest connections accepts first; who is told to wait waits for a moment only."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.io.crowd import Crowd, Turns


@pytest.mark.parametrize(
    ("counts", "first"),
    [
        ((0, 0), (True, True)),
        ((1, 0), (False, True)),
        ((3, 3, 4), (True, True, False)),
        ((5, None), (True, False)),  # who does not accept is waited for by nobody
    ],
)
def test_the_fewest_come_first(counts: tuple[int | None, ...], first: tuple[bool, ...]) -> None:
    crowd = Crowd.make()
    for place, count in enumerate(counts):
        if count is not None:
            crowd.note(place, count)

    assert [crowd.is_first(p) for p, c in enumerate(counts) if c is not None] == [
        is_first for is_first, count in zip(first, counts, strict=True) if count is not None
    ]


def test_who_leaves_is_waited_for_no_longer() -> None:
    crowd = Crowd.make()
    crowd.note(0, 0)
    crowd.note(1, 5)
    crowd.leave(0)

    assert crowd.is_first(1)


def test_the_counts_are_those_of_every_process_that_has_the_descriptor() -> None:
    crowd = Crowd.make()
    Crowd(crowd.descriptor).note(0, 0)
    crowd.note(1, 1)

    assert not crowd.is_first(1)


async def test_turns_last_for_a_moment_at_most(autojump_clock: MockClock) -> None:
    crowd = Crowd.make()
    one, other = Turns(crowd, 0), Turns(crowd, 1)
    one.note(3)
    other.note(0)
    began = trio.current_time()
    await other.wait()
    at_once = trio.current_time() - began
    await one.wait()

    assert at_once == 0
    assert trio.current_time() - began == pytest.approx(0.003)
