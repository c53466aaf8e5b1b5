"""Whose turn it is: virtual token counters, one for each tenant.

The virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models" (OSDI
2024).  Every tenant has a counter of the tokens it was served, each divided by the tenant's
weight, and the one with the lowest counter is next.  A tenant that begins to wait again is lifted
to the lowest counter of those who wait already, or if nobody does to that of the last one who
did, so that nobody saves up turns by staying away.

As in the paper, a token of the answer costs twice a token of the prompt.  The paper charges
tokens as they are made; here a request is charged when its turn comes, for an answer as long as
the tenant's last ones were, and corrected at its end.  So that this comes to the same, what is
still under way does not count where somebody is lifted.

Of equal counters the one that was served least recently is next: a newcomer does not wait for
another turn of somebody who never stops asking.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import TypeAlias

import attrs

from citadel_gateway.policy.priority import Party

ANSWER_WEIGHT = 2.0  # what a token of the answer costs, in tokens of the prompt
_RECENT = 0.2  # weight of the newest answer's length: about the last five count
_IDLE = 1000  # tenants remembered beyond those who wait

_Entry: TypeAlias = "tuple[float, int, int, Account]"


@attrs.define(eq=False)
class Account:
    """What one tenant was served.

    All tokens are divided by its weight already.

    :param counter: tokens that it was charged.
    :param under_way: the part of it that is for requests which are still being worked on.
    :param waiting: how many of its requests wait.
    :param answers: the length of its answers in tokens, lately.
    """

    counters: Counters = attrs.field(repr=False)
    weight: float
    counter: float = 0.0
    under_way: float = 0.0
    turn: int = 0  # when it was last served, in turns of all
    waiting: int = 0
    answers: float = 0.0
    entry: _Entry | None = attrs.field(default=None, repr=False)

    def charge(self, tokens: float) -> None:
        """Charge *tokens* of a request that is under way; a correction may be negative."""
        self.counter += tokens
        self.under_way += tokens
        if self.waiting:
            self.counters.place(self)

    def finish(self, tokens: float) -> None:
        """A request has ended to which *tokens* were charged."""
        self.under_way -= tokens

    def consumed(self) -> float:
        return self.counter - self.under_way

    def learn(self, answer: int) -> None:
        """An answer had so many tokens."""
        self.answers += (_RECENT if self.answers else 1.0) * (answer - self.answers)


@attrs.define(eq=False)
class Counters:
    """The accounts of all who wait for the same thing, and of those who did lately."""

    _accounts: dict[Hashable, Account] = attrs.field(factory=dict, init=False)
    _line: list[_Entry] = attrs.field(factory=list, init=False)  # old entries of some, too
    _waiting: int = attrs.field(default=0, init=False)
    _last: Account | None = attrs.field(default=None, init=False)  # who has waited
    _serial: int = attrs.field(default=0, init=False)
    _turns: int = attrs.field(default=0, init=False)

    def account(self, party: Party) -> Account:
        """The account of *party*; one that has nothing waiting is lifted."""
        account = self._accounts.get(party.tenant)
        if account is None:
            self._forget_idle()
            account = self._accounts[party.tenant] = Account(self, party.weight)
        if account.waiting == 0:
            account.weight = party.weight
            if (other := self.lowest() or self._last) is not None:
                account.counter = max(account.counter, other.consumed())
        return account

    def join(self, party: Party) -> Account:
        """One more request of *party* waits."""
        account = self.account(party)
        if account.waiting == 0:
            self._waiting += 1
            self.place(account)
        account.waiting += 1
        return account

    def quit(self, account: Account) -> None:
        """One request of it waits no more."""
        account.waiting -= 1
        if account.waiting == 0:
            account.entry = None
            self._waiting -= 1
            self._last = account

    def serve(self, account: Account) -> None:
        """One request of it has its turn, and is to be charged for it."""
        self._turns += 1
        account.turn = self._turns
        self.quit(account)

    def lowest(self) -> Account | None:
        """Whose turn it is, of those who wait."""
        line = self._line
        while line:
            entry = line[0]
            if entry[3].entry is entry:
                return entry[3]
            heappop(line)
        return None

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, tenant: Hashable) -> Account | None:
        return self._accounts.get(tenant)

    def place(self, account: Account) -> None:
        """Write down where it stands now."""
        self._serial += 1
        account.entry = (account.counter, account.turn, self._serial, account)
        if len(self._line) > 2 * self._waiting + 64:
            self._line = [entry for entry in self._line if entry[3].entry is entry]
            heapify(self._line)
        heappush(self._line, account.entry)

    def _forget_idle(self) -> None:
        if len(self._accounts) > 2 * self._waiting + _IDLE:
            self._accounts = {t: a for t, a in self._accounts.items() if a.waiting}
