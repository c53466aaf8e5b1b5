"""One gateway among those that share a store, and what it does when the store cannot be asked.

It meets the others several times in the seconds that its word is good for.  When the store is slow
or gone it is *alone*: it decides by what it knows, and takes its share and no more, as the others
do, too.  Nobody is refused for want of a store, and nobody waits for it longer than he is patient.
A meeting in good time ends that.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NoReturn

import attrs
import trio

from citadel_gateway.io.store.base import Buckets, Store, StoreUnavailable
from citadel_gateway.io.ticks import next_tick
from citadel_gateway.policy.board import News, Statement
from citadel_gateway.policy.claim import Claim, spend_leased
from citadel_gateway.policy.rate_limit import Allowance, Refusal, take_share, tightest

_MOST_MISSES = 3  # in a row, one after the other, which may be chance


@attrs.define(eq=False)
class Membership:
    """Of one process, from its start to its end.

    :param lease: seconds that its word is good for.
    :param patience: a meeting that takes longer does not count.
    :param members: how many there are, as far as is known.
    :param readers: each is given what the others have left, by name.
    :param on_change: told when it is alone (true) or among others again, and why.
    :param bulletin: asked before each meeting what it says under its own name, if that is new; it
        takes the place of what was said before, and goes with the member.
    :param on_bulletin: given what another one says under its own.
    """

    store: Store
    lease: float
    patience: float
    members: int
    on_change: Callable[[bool, str], None]
    name: str = attrs.field(factory=lambda: uuid.uuid4().hex)
    is_alone: bool = attrs.field(default=True, init=False)
    misses: int = attrs.field(default=0, init=False)  # requests that the store did not decide
    won: frozenset[str] = attrs.field(default=frozenset(), init=False)  # tasks it does for all
    claims: Callable[[], Iterable[str]] = attrs.field(default=tuple, init=False)
    readers: list[Callable[[Mapping[str, str]], None]] = attrs.field(factory=list, init=False)
    on_news: Callable[[], None] = attrs.field(default=lambda: None, init=False)
    bulletin: Callable[[], str | None] = attrs.field(default=lambda: None, init=False)
    on_bulletin: Callable[[str], None] = attrs.field(default=lambda _: None, init=False)
    _known: bool = attrs.field(default=False, init=False)  # whether it is alone was told
    _row: int = attrs.field(default=0, init=False)  # misses in a row
    _row_began: float = attrs.field(default=0.0, init=False)
    _seen: int = attrs.field(default=0, init=False)
    _counted_at: float = attrs.field(default=-math.inf, init=False)  # so many members, or more
    _good_until: float = attrs.field(default=-math.inf, init=False)
    _outbox: dict[str, str] = attrs.field(factory=dict, init=False)
    _posted: dict[str, str] = attrs.field(factory=dict, init=False)
    _meeting: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _hurry: trio.Event = attrs.field(factory=trio.Event, init=False)

    def now(self) -> float:
        """The store's time."""
        return self.store.now()

    # Limits.

    def take_nowait(self, buckets: Buckets) -> Allowance | Refusal | None:
        """Spend one unit of every bucket, or of none; ``None`` if it takes :meth:`take`."""
        now = trio.current_time()
        if spend_leased(buckets, now):
            return tightest(buckets, self.store.now())
        if self.is_alone:
            return self._take_share(buckets)
        if self.store.is_far:
            return None
        claim = Claim.of(buckets, now)
        try:
            result = self.store.take_nowait(claim.asked, claim.ahead)
        except StoreUnavailable as exc:
            return self._take_without(claim, exc)
        self._row = 0
        return claim.settle(result, self.store.now())

    async def take(self, buckets: Buckets) -> Allowance | Refusal:
        """The same over a round trip, as :meth:`take_nowait` could not."""
        claim = Claim.of(buckets, trio.current_time())
        try:
            result = await self.store.take(claim.asked, claim.ahead)
        except StoreUnavailable as exc:
            return self._take_without(claim, exc)
        except BaseException:
            claim.fail()
            raise
        self._row = 0
        return claim.settle(result, self.store.now())

    def _take_without(self, claim: Claim, why: StoreUnavailable) -> Allowance | Refusal:
        claim.fail()
        self._missed(str(why))
        return self._take_share(claim.buckets)

    def _take_share(self, buckets: Buckets) -> Allowance | Refusal:
        self.misses += 1
        return take_share(buckets, self.store.now(), self.members)

    # What is known together.

    def has_won(self, task: str) -> bool:
        """Whether this member does *task* for all; who is alone does everything himself."""
        return task in self.won or not self.is_good()

    def is_good(self) -> bool:
        """Whether others still go by what this member said last."""
        return trio.current_time() < self._good_until

    def post(self, name: str, text: str) -> None:
        """Let all others know, soon; what it said under the same name before is forgotten."""
        self._outbox[name] = f"{self.name} {text}"
        self.hurry()

    def keep(self, name: str, text: str) -> None:
        """Should the store lose everything, say it again, though it was another one who said it."""
        self._posted[name] = f"{self.name} {text}"

    def hurry(self) -> None:
        """Meet the others at once."""
        self._hurry.set()

    async def run(self) -> NoReturn:
        """Meet the others for ever."""
        while True:
            await self.meet()
            with trio.move_on_at(next_tick(self.store.every)):
                await self._hurry.wait()
            self._hurry = trio.Event()

    async def meet(self) -> None:
        """Once: say what there is to say, and hear what there is to hear."""
        async with self._meeting:
            await self._meet()

    async def _meet(self) -> None:
        if (said := self.bulletin()) is not None:
            self._outbox[self.name] = f"{self.name} {said}"
        posts, self._outbox = self._outbox, {}
        statement = Statement(
            member=self.name,
            lease=self.lease,
            seen=self._seen,
            claims=tuple(self.claims()),
            posts=posts,
        )
        began = trio.current_time()
        try:
            news = await self.store.meet(statement)
        except StoreUnavailable as exc:
            self._outbox = {**posts, **self._outbox}
            self._missed(str(exc))
            if not self.is_good():
                self.won = frozenset()
            return
        self._posted |= posts
        self._good_until = began + self.lease
        if trio.current_time() - began <= self.patience:
            self._found()
        self._hear(news)

    async def leave(self) -> None:
        """Others need not wait for the lease to end.  For a shielded, bounded scope."""
        if self.is_alone:
            return
        async with self._meeting:
            with suppress(StoreUnavailable):
                await self.store.meet(Statement(member=self.name, lease=0.0))

    def _hear(self, news: News) -> None:
        self.won, self._seen = news.won, news.version
        self._count(news.members)
        heard = {}
        for name, text in news.posts.items():
            member, _, said = text.partition(" ")
            if name == member != self.name:
                self.on_bulletin(said)
            elif member != self.name:
                self._posted.pop(name, None)  # theirs is newer
                heard[name] = said
        if news.was_emptied:
            self._outbox = {**self._posted, **self._outbox}
            self.hurry()
        if heard:
            for read in self.readers:
                read(heard)
        self.on_news()

    def _count(self, members: int) -> None:
        """A store that was emptied counts from the start: fewer are believed after a lease.

        Else who is alone at that moment took more than his share.
        """
        now = trio.current_time()
        if members >= self.members or now - self._counted_at >= self.lease:
            self.members, self._counted_at = members, now

    def _missed(self, why: str) -> None:
        now = trio.current_time()
        if not self._row:
            self._row_began = now
        self._row += 1
        # Requests that wait at the same time all miss by the same short standstill.
        lasts = now - self._row_began >= (_MOST_MISSES - 1) * self.patience
        if not self.is_alone and (self._row < _MOST_MISSES or not lasts):
            return
        if not self.is_alone or not self._known:
            self._known = self.is_alone = True
            self.on_change(True, why)

    def _found(self) -> None:
        self._row = 0
        if self.is_alone:
            if self._known:
                self.on_change(False, "")
            self._known, self.is_alone = True, False
