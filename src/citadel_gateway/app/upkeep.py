"""What becomes due without anybody coming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NoReturn

import attrs
import trio

from citadel_gateway.policy.circuit_breaker import Transition
from citadel_gateway.policy.endpoint import Endpoint


@attrs.define(eq=False)
class RestTimers:
    """Notes when endpoints have rested, and calls those who wait for them or may be given more.

    :param endpoints: those that are watched right now.
    :param call: looks whether somebody who waits can have an endpoint now.
    """

    endpoints: Callable[[], Iterable[Endpoint]]
    on_transition: Callable[[Endpoint, Transition], None]
    call: Callable[[], None]
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)

    def note(self) -> None:
        """Some endpoint rests that did not, or for another time, or has come back."""
        self._news.set()

    async def run(self) -> NoReturn:
        while True:
            now = trio.current_time()
            soonest = min((e.may_take_more_at(now) for e in self.endpoints()), default=math.inf)
            with trio.move_on_at(soonest):
                await self._news.wait()
            self._news = trio.Event()
            for endpoint in self.endpoints():
                transition = endpoint.breaker.ripen(trio.current_time())
                if transition is not None:
                    self.on_transition(endpoint, transition)
            self.call()
