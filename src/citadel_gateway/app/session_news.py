"""Gateways that share a store tell each other which sessions are elsewhere than at home.

They do so when they meet, some hundred at a time, in what each says under its own name.  That is
short: what all members have heard by now is left out of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeAlias

import attrs
import orjson
import trio

from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.sessions import Sessions
from citadel_gateway.policy.stamps import Stamps

_PORTION = 512  # sessions told in one meeting
_STAYS = 5.0  # seconds in which every member meets the others, or is taken for dead

_News: TypeAlias = "tuple[str, int, int]"
"""The name of an endpoint, a session's key, and a stamp."""


@attrs.define(eq=False)
class SessionNews:
    """Of one gateway.

    :param endpoints: all that there are now.
    :param name: of an endpoint, the same for every gateway.
    """

    membership: Membership
    sessions: Sessions
    endpoints: Callable[[], Iterable[Endpoint]]
    name: Callable[[Endpoint], str]
    _said: deque[tuple[float, _News]] = attrs.field(factory=deque, init=False)
    _stamps: Stamps = attrs.field(factory=Stamps, init=False)

    def __attrs_post_init__(self) -> None:
        self.sessions.is_shared = True
        self.membership.bulletin = self._say
        self.membership.on_bulletin = self._hear

    def _say(self) -> str | None:
        if self.membership.is_alone:
            return None  # nobody would hear it
        now = trio.current_time()
        fresh = list(self.sessions.take_news(self._stamp(), _PORTION))
        if not fresh:
            return None
        while self._said and now - self._said[0][0] > _STAYS:
            self._said.popleft()
        self._said.extend((now, (self.name(place), key, stamp)) for key, place, stamp in fresh)
        by_place: dict[str, list[tuple[int, int]]] = {}
        for _, (name, key, stamp) in self._said:
            by_place.setdefault(name, []).append((key, stamp))
        return orjson.dumps(by_place).decode()

    def _stamp(self) -> int:
        return self._stamps.make(self.membership.name, self.membership.now())

    def _hear(self, said: str) -> None:
        """What is about endpoints that are not known here is told again while it is used."""
        now, known = trio.current_time(), {self.name(e): e for e in self.endpoints()}
        for name, sessions in orjson.loads(said).items():
            for key, stamp in sessions:
                self._stamps.see(stamp)
                if (place := known.get(name)) is not None:
                    self.sessions.hear(key, place, stamp, now)
