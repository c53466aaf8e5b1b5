"""How long to wait before a request is sent once more.

Another endpoint is asked at once: that the first one failed says nothing about it.  From the third
attempt on more than one is in trouble, and an endpoint that is asked again needs a moment; so those
that failed together must not come back together.  "Full jitter" spreads them best: anything from
nothing to a bound that doubles (Brooker, "Exponential Backoff And Jitter", AWS, 2015).

An endpoint that says how long it wants to be left alone is believed, if that is not too long.
"""

from __future__ import annotations

from collections.abc import Callable

_FIRST = 0.05  # seconds: the bound of the first pause
_LONGEST = 2.0
_ENOUGH = 6  # doublings, to come to that
_LONGEST_REST = 60.0  # whoever is told to come so much later had better know at once


def pause(attempts: int, left: float, draw: Callable[[], float], *, same: bool) -> float:
    """Seconds before the next attempt.

    :param attempts: made so far.
    :param left: seconds that the request has.
    :param draw: returns a number from 0 to 1.
    :param same: it goes to an endpoint that has had it.
    """
    if attempts < 2 and not same:
        return 0.0
    bound = min(_LONGEST, _FIRST * 2.0 ** min(attempts - 1, _ENOUGH), left)
    return draw() * max(0.0, bound)


def is_worth_waiting(rest: float, left: float) -> bool:
    """Whether an endpoint's *rest* ends early enough for a request that has *left* seconds."""
    return rest < min(_LONGEST_REST, left)
