"""The requests of one class that would accept the same endpoints, each tenant's in its order."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

import attrs

from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.virtual_tokens import Account, Counters

T = TypeVar("T")
_INEXACT = 1e-6  # by how much a sum of weights may be off


@attrs.define(eq=False)
class FairQueue(Generic[T]):
    """Serves tenants by their counters, and each tenant's requests first come, first served.

    Every operation takes logarithmic time at most, but for :meth:`ahead_of`: its time may grow
    with the number of requests that the same tenant has waiting.
    """

    depth: int = attrs.field(default=0, init=False)
    counters: Counters = attrs.field(factory=Counters, init=False)
    _waiting: dict[Account, OrderedDict[T, None]] = attrs.field(factory=dict, init=False)
    # Who has more than 0, 1, 2 ... waiting; so the last of these are the longest queues.
    _levels: list[dict[Account, None]] = attrs.field(factory=list, init=False)
    _weights: float = attrs.field(default=0.0, init=False)  # of all who wait

    def push(self, party: Party, item: T) -> Account:
        account = self.counters.join(party)
        own = self._waiting.get(account)
        if own is None:
            own = self._waiting[account] = OrderedDict()
            self._weights += account.weight
        if len(own) == len(self._levels):
            self._levels.append({})
        self._levels[len(own)][account] = None
        own[item] = None
        self.depth += 1
        return account

    def first(self) -> tuple[Account, T]:
        """Whose turn it is; there must be one."""
        account = self.counters.lowest()
        if account is None:
            raise LookupError("nobody waits")
        return account, next(iter(self._waiting[account]))

    def serve(self, account: Account, item: T) -> None:
        """It has its turn; the account is to be charged for it."""
        self._drop(account, item)
        self.counters.serve(account)

    def remove(self, account: Account, item: T) -> None:
        """It waits no more, and had no turn."""
        self._drop(account, item)
        self.counters.quit(account)

    def length_of(self, tenant: Hashable) -> int:
        """How many requests of *tenant* wait."""
        account = self.counters.of(tenant)
        return 0 if account is None else account.waiting

    def longest(self) -> int:
        """The most requests that one tenant has waiting."""
        return len(self._levels)

    def newest_of_longest(self) -> T:
        """The request that waits at the very end of the longest of the tenants' queues."""
        account = next(iter(self._levels[-1]))
        return next(reversed(self._waiting[account]))

    def tenants(self) -> int:
        """How many tenants have requests waiting."""
        return len(self._waiting)

    def ahead_of(self, party: Party) -> int:
        """About how many would be served before one more request of *party*.

        All of its own that wait, and of each other tenant as many as it may have served in
        that time, if requests cost about the same.
        """
        own = self.length_of(party.tenant)
        rounds = own + 1  # of turns, one for each tenant in each
        if self._waiting:
            fair = rounds / party.weight * self._weights / len(self._waiting)
            rounds = math.ceil(fair - _INEXACT)
        if rounds >= len(self._levels):
            return self.depth  # all who wait
        return sum(map(len, self._levels[:rounds])) + max(0, own - rounds)

    def _drop(self, account: Account, item: T) -> None:
        own = self._waiting[account]
        del own[item]
        del self._levels[len(own)][account]
        if not self._levels[-1]:
            self._levels.pop()
        if not own:
            del self._waiting[account]
            self._weights = self._weights - account.weight if self._waiting else 0.0
        self.depth -= 1
