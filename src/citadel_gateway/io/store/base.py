"""What a store does for several gateways that are to be one: limits, caps, and what they know.

Every operation is one step, with nobody else in the middle of it.  What it decides is written down
in :mod:`citadel_gateway.policy`; a store only keeps the numbers, and the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol, TypeAlias

import trio

from citadel_gateway.policy.board import News, Statement
from citadel_gateway.policy.rate_limit import Allowance, Refusal, TokenBucket
from citadel_gateway.policy.shares import Grant, Need

Buckets: TypeAlias = Sequence[tuple[str, TokenBucket]]
Ahead: TypeAlias = Sequence[int]
Grants: TypeAlias = "dict[str, Grant]"


class StoreUnavailable(Exception):
    """The store cannot be asked, or does not answer; decide by what you know."""


class Store(Protocol):
    """One for all who were given the same address.

    :param is_far: asking takes a round trip.
    :param every: seconds between two meetings.
    """

    is_far: bool
    every: float

    def now(self) -> float:
        """The store's time, in seconds; the same for everybody."""

    def take_nowait(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        """Spend one unit of every bucket, or of none, in a store that is near.

        See :func:`~citadel_gateway.policy.rate_limit.take`.  Raises :class:`StoreUnavailable`.
        """

    async def take(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        """The same wherever it is.  Raises :class:`StoreUnavailable`."""

    async def meet(self, statement: Statement) -> News:
        """See :meth:`Board.meet`.  Raises :class:`StoreUnavailable`."""

    async def report(self, member: str, lease: float, needs: Mapping[str, Need]) -> Grants:
        """See :meth:`Cap.report`, for caps by name.  Raises :class:`StoreUnavailable`."""

    async def leave(self, member: str, caps: Sequence[str]) -> None:
        """Give back the shares of *caps*.  Raises :class:`StoreUnavailable`."""

    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> NoReturn:
        """Keep it open; what it needs is there once started.  Nothing else works before."""
