"""What several gateways know together: who is there, who does what for all, what was found out.

Theory of operation.  Every gateway, a *member*, comes by several times in the time for which its
statement holds.  It says which tasks it would do for all, such as probing an endpoint, and each
task has one holder: whoever claimed it first, as long as he comes by.  It leaves *posts*, such as
what a probe has found, and takes with it those that are newer than the last it saw.  Who stays
away is forgotten, and what he held is free for the next who claims it.

What a member posts under its own name goes with it: that way nothing is kept for those who never
come back.

A board that has lost everything is one that nobody has come by yet: members notice by its version,
which went back, and leave their posts again.  Where nobody's word holds any more, what was posted
is of members who have gone, and is taken down.  Should one of them come back, it is told the same,
and hears what there is from the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import attrs

MOST_POSTS = 10_000

Post: TypeAlias = "list[Any]"
"""A version, and a text."""


@attrs.frozen(kw_only=True)
class Statement:
    """What a member says.

    :param lease: seconds for which it holds; 0 to leave.
    :param seen: the version of the board that the member saw last.
    :param claims: all tasks that it would do; what it had and claims no longer is free.
    :param posts: texts by name; each takes the place of the one before it.
    """

    member: str
    lease: float
    seen: int = 0
    claims: tuple[str, ...] = ()
    posts: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class News:
    """What it hears.

    :param members: how many there are, with itself.
    :param won: those of its claims that it has.
    :param posts: what is newer than what it saw, its own included.
    :param was_emptied: the board may know less than it did when the member saw it.
    """

    version: int
    members: int
    won: frozenset[str]
    posts: dict[str, str]
    was_emptied: bool


@attrs.define
class Board:
    """Nothing but plain values, so that it can be kept anywhere.

    :param members: until when their statements hold.
    :param holders: of tasks: who, and until when.
    """

    version: int = 0
    members: dict[str, float] = attrs.field(factory=dict)
    holders: dict[str, list[Any]] = attrs.field(factory=dict)
    posts: dict[str, Post] = attrs.field(factory=dict)

    def meet(self, statement: Statement, now: float) -> News:
        """Take down what a member says, and tell it what is new."""
        me, until = statement.member, now + statement.lease
        if statement.lease > 0:
            self._bound(until)
        self._forget(now)
        if not self.members:
            self.posts.clear()
        was_emptied = statement.seen > self.version or (
            statement.seen > 0 and me not in self.members
        )
        for task in [t for t, (who, _) in self.holders.items() if who == me]:
            del self.holders[task]
        if statement.lease > 0:
            self.members[me] = until
            for task in statement.claims:
                self.holders.setdefault(task, [me, until])
        else:
            self._strike(me)
        won = {t for t in statement.claims if self.holders.get(t, [None])[0] == me}
        seen = 0 if was_emptied else statement.seen
        for name, text in statement.posts.items():
            self.version += 1
            self.posts.pop(name, None)
            self.posts[name] = [self.version, text]
        while len(self.posts) > MOST_POSTS:
            del self.posts[next(iter(self.posts))]
        return News(
            version=self.version,
            members=len(self.members),
            won=frozenset(won),
            posts={name: text for name, (version, text) in self.posts.items() if version > seen},
            was_emptied=was_emptied,
        )

    def _bound(self, until: float) -> None:
        """Nothing holds for longer than what is said now: else a clock has gone back."""
        for member in self.members:
            self.members[member] = min(self.members[member], until)
        for holder in self.holders.values():
            holder[1] = min(holder[1], until)

    def _forget(self, now: float) -> None:
        for member in [m for m, until in self.members.items() if until <= now]:
            self._strike(member)
        for task in [t for t, (_, until) in self.holders.items() if until <= now]:
            del self.holders[task]

    def _strike(self, member: str) -> None:
        self.members.pop(member, None)
        self.posts.pop(member, None)
