"""Cancel at every step there is: brute force over the moments in which a client may leave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import trio


@attrs.define(eq=False)
class StepCanceller(trio.abc.Instrument):
    """Cancels *scope* as some task of the run is about to take its *at*-th step from here on.

    If that task's wait was over already, the cancellation comes in the very tick of the success.
    """

    scope: trio.CancelScope
    at: int
    steps: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.scope.cancel(reason=f"step {self.at}")


async def cancel_at(step: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Do *work*, cancelled at *step*; false when it was over before."""
    with trio.CancelScope() as scope:
        canceller = StepCanceller(scope, step)
        trio.lowlevel.add_instrument(canceller)
        try:
            await work()
        finally:
            trio.lowlevel.remove_instrument(canceller)
    return canceller.steps >= step
