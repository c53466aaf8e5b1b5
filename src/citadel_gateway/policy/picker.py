"""What a picker is: endpoints in line, in the order in which they would be picked.

A picker looks at the endpoints in its order until one fits.  Nothing is counted or sorted anew for
a request, so that a thousand endpoints cost hardly more than four.

What a picker believes about an endpoint may be out of date in one direction only: busier than
believed is noticed when its turn comes, less busy must be told by :meth:`Picker.eased`.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Protocol, TypeAlias, runtime_checkable

from citadel_gateway.policy.endpoint import Endpoint

Score: TypeAlias = tuple[float, ...]
"""The lower, the sooner picked."""

Fits: TypeAlias = Callable[[Endpoint], bool]
"""Whether an endpoint can take a request now; one that cannot has to ``leave`` the line."""


class Picker(Protocol):
    def join(self, endpoint: Endpoint, place: float = 0.5, /) -> None:
        """Stand in line, for the first time or again.

        :param place: from 0 to 1, where among those that join at the same time.
        """

    def leave(self, endpoint: Endpoint) -> None:
        """Stand aside for a while."""

    def forget(self, endpoint: Endpoint) -> None:
        """Leave for good."""

    def eased(self, endpoint: Endpoint) -> None:
        """It has less to do than before."""

    def reweigh(self, endpoint: Endpoint) -> None:
        """Its weight is another than before."""

    def in_order(self) -> list[Endpoint]:
        """Those in line, in the order in which they would be picked, as far as that is known."""

    def pick(self, tried: Container[Endpoint], fits: Fits) -> Endpoint | None:
        """One that was not *tried* and fits."""


@runtime_checkable
class KeyedPicker(Picker, Protocol):
    """One that goes by what a request belongs to."""

    def pick_for(
        self, key: int, tried: Container[Endpoint], fits: Fits, now: float, /
    ) -> Endpoint | None:
        """The same for what has this *key*, of 64 bits."""
