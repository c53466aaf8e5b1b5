"""A request that spends units of several buckets: leased ones where there are some, else asked for.

What is leased is put aside before the store is asked for the rest, which may take a while, and is
given back if that is refused: who is refused by one bucket pays no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from citadel_gateway.policy.rate_limit import Allowance, Refusal, TokenBucket, tightest
from citadel_gateway.policy.token_lease import TokenLease


def spend_leased(buckets: Sequence[tuple[str, TokenBucket]], now: float) -> bool:
    """Use a leased unit of every bucket, or of none."""
    for _, bucket in buckets:
        lease = bucket.lease
        if lease is None or not lease.left or now >= lease.until:
            return False
    for _, bucket in buckets:
        if (lease := bucket.lease) is not None:
            lease.spend(now)
    return True


@attrs.define(eq=False)
class Claim:
    """Made by :meth:`of`; then it has to be settled, or it fails.

    :param now: when it began; all leases that come of it end a lease's length later at the latest.
    :param asked: what the store has to be asked for.
    :param ahead: and how many units of each to lease besides.
    """

    buckets: Sequence[tuple[str, TokenBucket]]
    now: float
    asked: list[tuple[str, TokenBucket]]
    ahead: list[int]
    _aside: list[tuple[TokenLease, float]]
    _leases: list[TokenLease]

    @classmethod
    def of(cls, buckets: Sequence[tuple[str, TokenBucket]], now: float) -> Claim:
        """By the gateway's own clock, whose *now* is not later than the store is asked."""
        claim = cls(buckets, now, [], [], [], [])
        for named in buckets:
            bucket = named[1]
            lease = bucket.lease
            if lease is None:
                lease = bucket.lease = TokenLease(now)
            if lease.spend(now):
                claim._aside.append((lease, lease.until))
            else:
                claim.asked.append(named)
                claim.ahead.append(lease.ask(now, bucket.lease_length))
                claim._leases.append(lease)
        return claim

    def settle(self, result: Allowance | Refusal, now: float) -> Allowance | Refusal:
        """What becomes of it by what the store said, at *now* by the store's clock."""
        if isinstance(result, Refusal):
            self.fail()
            return result
        units = result.ahead or [0] * len(self.asked)
        for i, lease in enumerate(self._leases):
            lease.used += 1
            if self.ahead[i]:
                lease.receive(units[i], self.now + self.asked[i][1].lease_length)
        return tightest(self.buckets, now) if self._aside or result.ahead else result

    def fail(self) -> None:
        """It was refused, or nothing is known of it."""
        for lease, until in self._aside:
            lease.give_back(until)
        for lease, wanted in zip(self._leases, self.ahead, strict=True):
            if wanted:
                lease.receive(0, self.now)
