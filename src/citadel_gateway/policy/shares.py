"""A cap that several gateways keep together: how much of it each may use.

Theory of operation.  Each gateway, a *member*, reports what it uses of the cap and what it could
use besides; it is told its *limit*, up to which it may begin new things without asking anybody.
What a member may use is held for it, or what it does use if that is more, until its report is too
old; so all that is held together is never more than the cap, and nobody has to be asked first.
Until it has heard the answer it may go by the one before; so who gets less has that held for it
until its next report, which says that it has heard.

While there is enough for all, everybody has some to spare, and as much again stays free for
whoever asks next.  When there is not, the cap is shared out evenly among those who need it: nobody
gets more than he needs, and what cannot be divided goes to who has least, and has waited longest.
Members who have more than that begin nothing new; what they finish is free at their next report.

Who has been forgotten, because the store lost everything, brings along what it goes by.  Until
all have had the time to do that, nobody gets more than he had.  The same holds if nobody has
reported for so long that it was the store that was away: those whose reports are too old may be
as alive as the one who reports first.  Whoever has never reported before brings nothing, and so
begins no such time.
"""

from __future__ import annotations

import math

import attrs

GRACE = 1.0  # seconds in which everybody reports
_SILENCE = 0.5  # of a lease, in which everybody reports
_SPARED = 2  # of what is left over, the part that nobody gets in advance


@attrs.frozen
class Need:
    """A member's report.

    :param limit: what it goes by until it hears; ``None`` if it never reported before.
    :param used: what it uses now.
    :param wants: what it could use besides.
    """

    cap: int
    limit: int | None
    used: int
    wants: int


@attrs.frozen
class Grant:
    """The answer.

    :param held: what others cannot have before its next report.
    :param is_contended: others need what it may have to give.
    """

    limit: int
    held: int
    is_contended: bool


@attrs.define
class Share:
    """What is written down of a member.

    :param need: what it uses and could use besides.
    :param since: when it got more or less for the last time, or needed nothing more.
    """

    held: int
    need: int
    since: float
    until: float


@attrs.define
class Cap:
    """Nothing but plain values, so that it can be kept anywhere.

    :param lost_at: when somebody noticed that everything was lost, or everybody silent.
    """

    lost_at: float = -math.inf
    shares: dict[str, Share] = attrs.field(factory=dict)

    def report(self, member: str, need: Need, lease: float, now: float) -> Grant:
        """Take down what *member* needs, and tell it what it may use for *lease* seconds."""
        for share in self.shares.values():  # a clock that has gone back makes nobody live longer
            share.until = min(share.until, now + lease)
        self.lost_at = min(self.lost_at, now)
        heard = max((share.until for share in self.shares.values()), default=now) - lease
        for gone in [m for m, share in self.shares.items() if share.until <= now]:
            del self.shares[gone]
        before = self.shares.get(member)
        mine = Share(need.limit or 0, 0, now, 0.0) if before is None else before
        is_silent = now - heard > lease * _SILENCE
        if need.limit is not None and (before is None or is_silent):
            self.lost_at = now
        had = mine.held
        mine.need, mine.until = need.used + need.wants, now + lease
        if not need.wants:
            mine.since = now
        self.shares[member] = mine
        others = [share for m, share in self.shares.items() if m != member]
        free = need.cap - sum(share.held for share in others)
        limit = max(0, min(self._due(member, need.cap), free))
        if now < self.lost_at + GRACE:
            limit = min(limit, had)
        mine.held = max(need.used, limit, min(need.limit or 0, had))
        if mine.held != had:
            mine.since = now
        waiting = any(share.need > share.held for share in others)
        return Grant(limit, mine.held, is_contended=waiting)

    def leave(self, member: str) -> None:
        self.shares.pop(member, None)

    def _due(self, member: str, cap: int) -> int:
        """What *member* would have if nobody used anything yet."""
        mine, needs = self.shares[member], sorted(share.need for share in self.shares.values())
        left, count, even = cap - sum(needs), len(needs), 0
        if left >= 0:
            return mine.need + left // (_SPARED * count)
        left = cap
        for need in needs:
            even = left // count
            if need > even:
                break  # at the latest for who needs most, as there is too little for all
            left, count = left - need, count - 1
        if mine.need <= even:
            return mine.need
        before = sum(
            share.need > even and (share.held, share.since, who) < (mine.held, mine.since, member)
            for who, share in self.shares.items()
        )
        return even + (before < left - even * count)
