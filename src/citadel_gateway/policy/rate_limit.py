"""How often somebody may ask: token buckets, kept as one number each.

GCRA, the generic cell rate algorithm (ITU-T I.371, annex A): a full bucket is a *theoretical
arrival time* in the past, spending moves it into the future, and nothing has to run to refill
it.  The time until the next request fits is therefore exact, and so is ``Retry-After``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import attrs

from citadel_gateway.policy.token_lease import TokenLease, length_of, units_ahead

_NOW = 1e-6  # seconds: sums of floats are off by less, and nobody is turned away for that


@attrs.define(eq=False)
class TokenBucket:
    """A bucket that holds *burst* units and refills with *rate* units a second.

    :param tat: when it will be full again; where a store keeps the buckets, as last seen there.
    :param key: names it in a store.
    :param lease: what was taken ahead of it, where a store keeps it.
    """

    rate: float
    burst: float
    tat: float = attrs.field(default=-math.inf, init=False)
    key: bytes = attrs.field(default=b"", init=False)
    lease: TokenLease | None = attrs.field(default=None, init=False)
    _step: float = attrs.field(init=False)  # seconds that one unit takes to refill
    _depth: float = attrs.field(init=False)  # and the whole bucket
    _whole: int = attrs.field(init=False)  # units in a full one

    def __attrs_post_init__(self) -> None:
        self._step, self._depth = 1.0 / self.rate, self.burst / self.rate
        self._whole = int(self.burst)

    def take_over(self, before: TokenBucket, now: float) -> None:
        """Hold as much as *before* does, as far as there is room for it: no burst is given away."""
        held = before.burst - max(0.0, before.tat - now) * before.rate
        missing = self.burst - held
        self.tat = now + missing * self._step if missing > 0 else -math.inf

    def wait(self, now: float, cost: float = 1.0) -> float:
        """Seconds until *cost* units fit; 0.0 if they fit now; inf if they never will."""
        if cost > self.burst:
            return math.inf
        tat = self.tat
        wait = (tat - now if tat > now else 0.0) + cost * self._step - self._depth
        return wait if wait > _NOW else 0.0

    def spend(self, now: float, cost: float = 1.0) -> float:
        """Take *cost* units; returns how much of the whole bucket is spent now, from 0 to 1."""
        tat = self.tat
        tat = self.tat = (max(now, tat)) + cost * self._step
        return (tat - now) / self._depth

    def allowance(self, now: float) -> Allowance:
        """What there is to tell about it: of whole units, those that would fit now."""
        tat, whole = self._unleased(), self._whole
        if tat <= now:
            return Allowance(whole, whole, 0.0)
        filled = int(self.burst - (tat - now - _NOW) * self.rate)
        if filled >= whole:
            filled = whole
        return Allowance(whole, max(0, filled), tat - now)

    def spent(self, now: float) -> float:
        """How much of the whole bucket is spent, from 0 to 1; below 0 if it is more than full."""
        return (self._unleased() - now) / self._depth

    def is_full(self, now: float) -> bool:
        return self.tat <= now

    def learn(self, tat: float, now: float) -> None:
        """Take over what a store says, unless more is known to be spent.

        It may have forgotten everything, but a bucket's own time never goes back.  No bucket can
        be emptier than empty, whatever became of the store's clock or of the limits.
        """
        self.tat = min(max(self.tat, tat), now + self._depth)

    def lease_out(self, wanted: int, now: float) -> int:
        """Spend up to *wanted* units ahead, see :mod:`.token_lease`; returns how many."""
        units = units_ahead(wanted, self.tat, now, self._step, self._depth) if wanted else 0
        if units:
            self.tat = max(self.tat, now + self.lease_length) + units * self._step
        return units

    @property
    def lease_length(self) -> float:
        """Seconds that a lease lasts."""
        return length_of(self._depth)

    def _unleased(self) -> float:
        """When it will be full again if nothing of what was taken ahead is used."""
        lease = self.lease
        return self.tat if lease is None else self.tat - lease.left * self._step


@attrs.frozen
class Allowance:
    """What the tightest bucket says after a request was let through.

    :param ahead: units that were taken ahead of each bucket, if any were asked for.
    """

    limit: int
    remaining: int
    reset: float
    ahead: Sequence[int] = ()


@attrs.frozen
class Refusal:
    """Which limit refused, and when the same request would be let through."""

    limit: str
    retry_after: float
    allowance: Allowance


def take(
    buckets: Sequence[tuple[str, TokenBucket]], now: float, ahead: Sequence[int] = ()
) -> Allowance | Refusal:
    """Spend one unit of every bucket, or of none: who is refused by one pays no other.

    :param buckets: the limits that apply, by name; at least one.
    :param ahead: units of each bucket to lease besides.
    """
    longest = 0.0
    for name, bucket in buckets:
        if (wait := bucket.wait(now)) > longest:
            longest, limit, refusing = wait, name, bucket
    if longest > 0:
        return Refusal(limit, longest, refusing.allowance(now))
    most = -1.0
    for _, bucket in buckets:
        if (spent := bucket.spend(now)) > most:
            most, tightest = spent, bucket
    allowance = tightest.allowance(now)
    if ahead:
        leased = [bucket.lease_out(n, now) for (_, bucket), n in zip(buckets, ahead, strict=True)]
        return attrs.evolve(allowance, ahead=leased)
    return allowance


def tightest(buckets: Sequence[tuple[str, TokenBucket]], now: float) -> Allowance:
    """What the bucket says of which most is spent."""
    found = buckets[0][1]
    if len(buckets) > 1:
        most = found.spent(now)
        for _, bucket in buckets[1:]:
            if (spent := bucket.spent(now)) > most:
                most, found = spent, bucket
    return found.allowance(now)


def take_share(
    buckets: Sequence[tuple[str, TokenBucket]], now: float, among: int
) -> Allowance | Refusal:
    """The same for one of *among* who cannot ask each other: what it takes, all others may, too.

    Where a bucket holds less than one unit for each, it has to be full, and is then spent beyond
    its bottom, so that all together go on with its rate.
    """
    longest = 0.0
    for name, bucket in buckets:
        if (wait := bucket.wait(now, min(float(among), bucket.burst))) > longest:
            longest, limit, refusing = wait, name, bucket
    if longest > 0:
        return Refusal(limit, longest, refusing.allowance(now))
    spent = [bucket.spend(now, float(among)) for _, bucket in buckets]
    return buckets[spent.index(max(spent))][1].allowance(now)


@attrs.define(eq=False)
class ClientBuckets:
    """A bucket for each client, in bounded memory.

    A full bucket carries no information and may be forgotten at any time.  When there are *most*,
    the least recently used one goes: nearly always it is full, and finding it costs nothing.
    """

    rate: float
    burst: float
    most: int = 10_000
    _buckets: OrderedDict[str, TokenBucket] = attrs.field(factory=OrderedDict, init=False)

    def of(self, client: str, now: float) -> TokenBucket:
        found = self._buckets.get(client)
        if found is None:
            self._make_room(now)
            found = self._buckets[client] = TokenBucket(self.rate, self.burst)
            found.key = b"client:" + client.encode()
        else:
            self._buckets.move_to_end(client)
        return found

    def take_over(self, before: ClientBuckets, now: float) -> None:
        """Hold for each client what *before* does; full ones need not be known."""
        for client, bucket in before._buckets.items():
            if not bucket.is_full(now):
                self._buckets[client] = mine = TokenBucket(self.rate, self.burst)
                mine.key = bucket.key
                mine.take_over(bucket, now)

    def forget_full(self, now: float) -> int:
        """Drop every bucket that is full again; returns how many."""
        full = [client for client, bucket in self._buckets.items() if bucket.is_full(now)]
        for client in full:
            del self._buckets[client]
        return len(full)

    def __len__(self) -> int:
        return len(self._buckets)

    def _make_room(self, now: float) -> None:
        while self._buckets:
            oldest = next(iter(self._buckets.values()))
            if len(self._buckets) < self.most and not oldest.is_full(now):
                return
            self._buckets.popitem(last=False)
