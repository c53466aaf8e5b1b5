"""Who goes first in a turn of the event loop: work that was taken on, then a few newcomers.

Trio runs everybody for whom something has arrived, then looks again.  Under a flood of requests
those are a thousand at once, and a turn takes as long as a thousand refusals.  Meanwhile no chunk
of any stream moves, no engine's answer begins and no probe is answered, so that slots stand empty
because of requests that are refused anyway.  So clients' connections are let in a few in each
turn, in the order in which their bytes came, and everything else at once.  It is the rule of
receive livelock: work that is begun goes before work that arrives (Mogul and Ramakrishnan,
"Eliminating receive livelock in an interrupt-driven kernel", 1997).

That takes the place of Trio's epoll, which it does not publish.  Where that is not to be had,
everybody goes at once, as Trio has it.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from itertools import islice
from typing import Any

import attrs

MOST = 16
"""Newcomers in one turn.  A refusal takes a tenth of a millisecond, so that is what a chunk waits
for at most, about."""


@attrs.define(eq=False)
class Turnstile:
    """Stands before *epoll*, and does what Trio asks of one; one for each event loop."""

    epoll: select.epoll
    register: Callable[..., None] = attrs.field(init=False)
    modify: Callable[..., None] = attrs.field(init=False)
    unregister: Callable[..., None] = attrs.field(init=False)
    fileno: Callable[[], int] = attrs.field(init=False)
    close: Callable[[], None] = attrs.field(init=False)
    _newcomers: set[int] = attrs.field(factory=set, init=False)
    _waiting: dict[int, int] = attrs.field(factory=dict, init=False)  # events, the oldest first
    _poll: Callable[[float, int], list[tuple[int, int]]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Bound here, so that they cost Trio what they cost it before.
        self.register, self.modify = self.epoll.register, self.epoll.modify
        self.unregister, self.close = self.epoll.unregister, self.epoll.close
        self.fileno, self._poll = self.epoll.fileno, self.epoll.poll

    @property
    def newcomers(self) -> int:
        """How many let others go first."""
        return len(self._newcomers)

    @property
    def is_anybody_waiting(self) -> bool:
        """Whether somebody is ready who has not had a turn: the loop must not wait for others."""
        return bool(self._waiting)

    def enter(self, descriptor: int) -> None:
        """From now on, *descriptor* lets others go first.  Follow with :meth:`leave`."""
        self._newcomers.add(descriptor)

    def leave(self, descriptor: int) -> None:
        """It is about to be closed, and its number may be anybody's in the next moment."""
        self._newcomers.discard(descriptor)
        self._waiting.pop(descriptor, None)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        """Those whose turn it is.  Who has to wait is kept here: Trio asks for one event each."""
        waiting = self._waiting
        events = self._poll(0.0 if waiting else timeout, most)
        if not waiting and len(events) <= MOST:
            return events
        newcomers, first = self._newcomers, []
        for descriptor, flags in events:
            if descriptor in newcomers:
                waiting[descriptor] = waiting.get(descriptor, 0) | flags
            else:
                first.append((descriptor, flags))
        turn = tuple(islice(waiting, MOST))
        return first + [(descriptor, waiting.pop(descriptor)) for descriptor in turn]


def turnstile() -> Turnstile | None:
    """That of the event loop that runs; ``None`` where there can be none."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        manager: Any = GLOBAL_RUN_CONTEXT.runner.io_manager
        epoll: object = manager._epoll
        if isinstance(epoll, select.epoll):
            manager._epoll = epoll = Turnstile(epoll)
    except (ImportError, AttributeError):
        return None
    return epoll if isinstance(epoll, Turnstile) else None
