"""One request's place: what it wants, where it stands, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeAlias

import attrs

from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.pace import Pace
from citadel_gateway.policy.priority import NEWCOMER, Party
from citadel_gateway.policy.virtual_tokens import ANSWER_WEIGHT, Account

if TYPE_CHECKING:
    from citadel_gateway.policy.line import Line


@attrs.frozen
class Nobody:
    """No endpoint will take the request soon; the earliest chance is in *retry_after* seconds."""

    retry_after: float


@attrs.frozen
class Displaced:
    """It had to give up its place in a full queue to somebody with fewer or more urgent ones."""

    retry_after: float


Choice: TypeAlias = "Endpoint | Nobody | None"
"""An endpoint, or that there is none, or (``None``) that waiting may help."""


@attrs.define(eq=False)
class Bill:
    """What a request is charged: by estimate at its turn, truly at its end.

    :param account: of its tenant in the line that it waits in.
    :param house: of its tenant in all lines together.
    :param weight: the tenant's.
    :param tokens: what was charged so far, by weight; ``None`` before its turn and after its end.
    """

    account: Account
    house: Account
    weight: float
    tokens: float | None = attrs.field(default=None, init=False)

    def charge(self, tokens: float) -> None:
        """It comes to *tokens*, whatever was charged before."""
        due = tokens / self.weight
        more = due - (self.tokens or 0.0)
        self.account.charge(more)
        self.house.charge(more)
        self.tokens = due

    def close(self) -> None:
        """The request has ended, and what was charged is what it cost."""
        if self.tokens is not None:
            self.account.finish(self.tokens)
            self.house.finish(self.tokens)
            self.tokens = None


@attrs.define(eq=False)
class Ticket:
    """One request's place, from its arrival to its end.

    :param queue: bounds and names the queue it waits in: the model asked for.
    :param group: tickets of one group would accept the same endpoints.
    :param choose: asked for an endpoint whenever one may have become free; takes ``now``.
    :param party: whose it is.
    :param prompt: tokens, as estimated.
    :param answer: tokens at most.
    :param deadline: it waits no longer than until then.
    """

    queue: str
    group: Hashable
    choose: Callable[[float], Choice]
    party: Party = NEWCOMER
    prompt: int = 0
    answer: float = math.inf
    deadline: float = math.inf
    serial: int = attrs.field(default=0, init=False)
    outcome: Slot | Nobody | Displaced | None = attrs.field(default=None, init=False)
    line: Line | None = attrs.field(default=None, init=False)  # it waits in it
    returning: bool = attrs.field(default=False, init=False)  # it had a slot before
    bill: Bill | None = attrs.field(default=None, init=False)
    pace: Pace | None = attrs.field(default=None, init=False)  # it is seated, and counted here
    since: float = attrs.field(default=0.0, init=False)

    @property
    def seated(self) -> bool:
        return self.pace is not None

    def swap(self, other: Ticket) -> None:
        """Exchange slots with *other*, which has one for the same request."""
        self.outcome, other.outcome = other.outcome, self.outcome
        self.since, other.since = other.since, self.since

    def charge(self) -> None:
        """Charge what it may come to, now that it has its turn."""
        if self.bill is not None:
            answer = min(self.answer, self.bill.account.answers)
            self.bill.charge(self.prompt + ANSWER_WEIGHT * answer)

    def settle(self, prompt: int, answer: int) -> None:
        """Charge what was really used, in tokens; unless nobody had to wait for it."""
        if self.bill is None or self.bill.tokens is None:
            return
        self.bill.charge((prompt or self.prompt) + ANSWER_WEIGHT * answer)
        if answer:
            self.bill.account.learn(answer)
