"""Which endpoints sessions are with, and what other gateways have to be told of that.

Theory of operation.  Most sessions are where anybody can compute that they are: at home, see
:mod:`.ring`.  So gateways that share sessions need not ask each other, or a store, where one is:
they tell each other of those that are *elsewhere*, because their home was down or busy when they
began, or because it is another one than it was since endpoints came.  They tell it after the fact,
many at once, and a request never waits for it.

Of two places that a session was given, the one that counts is the one that was decided on last, by
a *stamp* that all compare in the same way; so whatever two gateways decide at the same time, and in
whatever order they hear of it, they end up with the same place.  What a gateway only has computed,
and not decided, has the stamp 0: it gives way to anything that is heard.

A gateway that has just come knows nothing.  So what is elsewhere, and used, is told again once a
minute, by whoever uses it first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from weakref import ReferenceType, ref

import attrs

from citadel_gateway.policy.endpoint import Endpoint

_MOST = 32_768  # sessions that are remembered, about 10 MB of them
_AGAIN = 60.0  # seconds until what is elsewhere is told again


@attrs.define(eq=False)
class Session:
    """What is known of one.

    :param place: whom it is with; an endpoint that nobody has to do with any more is not kept.
    :param stamp: of the decision; ``None`` until it is told, and 0 if it was none.
    :param used: when it had its last request, or was heard of.
    :param due: when to tell of it again.
    """

    place: ReferenceType[Endpoint]
    used: float
    stamp: int | None = 0
    due: float = 0.0


@attrs.define(eq=False)
class Sessions:
    """Those that were used in the last *idle* seconds, as far as there is room.

    :param is_shared: whether anybody wants to be told.
    """

    idle: float = 3600.0
    is_shared: bool = False
    most: int = _MOST
    _known: OrderedDict[int, Session] = attrs.field(factory=OrderedDict, init=False)
    _untold: dict[int, None] = attrs.field(factory=dict, init=False)

    def __deepcopy__(self, _: dict[int, object]) -> Sessions:
        """For who wants to know what a choice would be: without copying what it does not need."""
        return _Glance(others=self)

    def find(self, key: int, now: float) -> Session | None:
        """The session *key*, which is in use."""
        session = self._known.get(key)
        if session is None:
            return None
        if now - session.used > self.idle:
            del self._known[key]
            return None
        session.used = now
        self._known.move_to_end(key)
        return session

    def begin(self, key: int, place: Endpoint, now: float, *, at_home: bool) -> None:
        """It has its first request, as far as is known here."""
        session = self._remember(key, place, now)
        if not at_home:
            self._decide(key, session, now)

    def move(self, key: int, session: Session, place: Endpoint, now: float) -> None:
        """It is with *place* from now on."""
        session.place = ref(place)
        self._decide(key, session, now)

    def stay(self, key: int, session: Session, now: float) -> None:
        """It is elsewhere, where it was before."""
        if now >= session.due:
            if session.stamp == 0:  # its home has changed, and it has not
                self._decide(key, session, now)
            else:
                self._tell(key, session, now)

    def take_news(self, stamp: int, most: int) -> Iterator[tuple[int, Endpoint, int]]:
        """What is to be told, *most* at once: keys, places and stamps.

        :param stamp: for what was decided since the last time; larger than that one's.
        """
        for key in [*self._untold][:most]:
            del self._untold[key]
            session = self._known.get(key)
            if session is None or (place := session.place()) is None:
                continue
            if session.stamp is None:
                session.stamp = stamp
            yield key, place, session.stamp

    def hear(self, key: int, place: Endpoint, stamp: int, now: float) -> None:
        """Another gateway says where it is."""
        session = self._known.get(key)
        if session is None:
            session = self._remember(key, place, now)
        elif session.stamp is None or session.stamp > stamp:
            return  # ours is newer; the other one will hear of it
        session.place, session.stamp, session.due = ref(place), stamp, now + _AGAIN
        self._untold.pop(key, None)

    def _remember(self, key: int, place: Endpoint, now: float) -> Session:
        known = self._known
        for _ in range(2):  # so that it shrinks, when there are fewer than before
            if not known:
                break
            oldest = next(iter(known))
            if len(known) < self.most and now - known[oldest].used <= self.idle:
                break
            del known[oldest]
        session = known[key] = Session(ref(place), now)
        known.move_to_end(key)
        return session

    def _decide(self, key: int, session: Session, now: float) -> None:
        session.stamp = None
        self._tell(key, session, now)

    def _tell(self, key: int, session: Session, now: float) -> None:
        session.due = now + _AGAIN
        if self.is_shared and len(self._untold) < self.most:
            self._untold[key] = None


@attrs.define(eq=False)
class _Glance(Sessions):
    """Knows what *others* know, and changes nothing there."""

    others: Sessions = attrs.field(kw_only=True)

    def find(self, key: int, now: float) -> Session | None:
        session = self.others._known.get(key)
        if session is None or now - session.used > self.others.idle:
            return None
        return attrs.evolve(session)
