"""Who waits for an endpoint that asked to be left alone is called when that is over."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from citadel_gateway.io.deadlines import Deadline, Deadlines
from citadel_gateway.policy.endpoint import Endpoint


@attrs.define(eq=False)
class CoolDowns:
    """The endpoints that are left alone, with one deadline for all of them.

    :param on_end: told that one may be asked again.
    """

    deadlines: Deadlines
    on_end: Callable[[], None]
    _resting: set[Endpoint] = attrs.field(factory=set, init=False)
    _deadline: Deadline | None = attrs.field(default=None, init=False)

    def begin(self, endpoint: Endpoint) -> None:
        """It has been told to cool down."""
        self._resting.add(endpoint)
        if self._deadline is None:
            self._deadline = self.deadlines.add(self._ring)
        if endpoint.cooling_until < self._deadline.due:
            self.deadlines.move(self._deadline, endpoint.cooling_until)

    def _ring(self) -> None:
        now, deadline = trio.current_time(), self._deadline
        self._resting = {each for each in self._resting if now < each.cooling_until}
        if deadline is not None and self._resting:
            self.deadlines.move(deadline, min(each.cooling_until for each in self._resting))
        elif deadline is not None:
            self.deadlines.discard(deadline)
            self._deadline = None
        self.on_end()
