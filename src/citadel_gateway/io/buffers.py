"""A common budget for what requests and answers take up in memory while they are whole there.

Limits of one body bound nothing if hundreds of them may come at once.  Bodies are counted before
they are read, by the length that their heads announce, and by what has come where none is
announced.
"""

from __future__ import annotations

from typing import Protocol

import attrs
import trio

UNCOUNTED = 64 * 1024
"""Smaller bodies are free: they come in one read with their heads, and that is nearly all."""

STEP = 2**20
"""Bytes by which a body grows in the budget whose length nobody knows."""

_PATIENCE = 10.0  # seconds that an answer may wait for room


class Holder(Protocol):
    """Whose bytes they are: a request."""

    held: int


class NoRoom(Exception):
    """The budget is used up."""


@attrs.define(eq=False)
class Buffers:
    """The budget.  Whatever a request holds, :meth:`let_go` gives back when it has ended.

    :param limit: bytes, all requests together.
    """

    limit: float = float("inf")
    used: int = attrs.field(default=0, init=False)
    _overdrawn: Holder | None = attrs.field(default=None, init=False)  # by whom
    _freed: trio.Event | None = attrs.field(default=None, init=False)

    def hold(self, holder: Holder, size: int) -> None:
        """Count *size* bytes as *holder*'s.  Raises :class:`NoRoom`, and then has not."""
        if self.used + size > self.limit:
            raise NoRoom
        self.used += size
        holder.held += size

    def let_go(self, holder: Holder, down_to: int = 0) -> None:
        """Give back all that *holder* has but *down_to* bytes."""
        if holder.held > down_to:
            self.used -= holder.held - down_to
            holder.held = down_to
            if self._overdrawn is holder:
                self._overdrawn = None
            if self._freed is not None:
                self._freed.set()
                self._freed = None

    async def wait_to_hold(self, holder: Holder, size: int) -> None:
        """Count *size* bytes more of an answer, which cannot be asked for again.

        There is some patience for it, and one at a time may overdraw the budget: else several
        that have half of their answers would wait for each other.  Raises :class:`NoRoom`.
        """
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(_PATIENCE):
            while not self._may_hold(holder, size):
                if self._freed is None:
                    self._freed = trio.Event()
                await self._freed.wait()
        if not self._may_hold(holder, size):
            raise NoRoom
        if self.used + size > self.limit:
            self._overdrawn = holder
        self.used += size
        holder.held += size

    def _may_hold(self, holder: Holder, size: int) -> bool:
        return self.used + size <= self.limit or self._overdrawn in (None, holder)
