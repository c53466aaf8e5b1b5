"""Moving the chunks of streams that are under way, without waking their tasks.

A stream in full flow needs no decisions: a chunk comes in, is looked at, and goes out.  Waking its
task for that costs more than the work, so the task sleeps in :meth:`Pump.carry`, and its *step* is
called when its socket is readable.  The task is woken when there is something to decide or to wait
for.  It stays the owner of everything: cancelling it ends the carrying like any other wait.

On Linux the steps are called where Trio would wait for I/O: the pump waits for the streams' sockets
and for Trio's own events at once, and returns to Trio as soon as there is anything for it to do.
That takes Trio's epoll descriptor, which it does not publish.  Where that is not to be had, a task
waits for the sockets in the ordinary way, and all else is the same.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TypeAlias

import attrs
import outcome
import trio

from citadel_gateway.io.turnstile import Turnstile, turnstile

_MOST = 256  # events taken at once
_LONGEST = 3600.0


Step: TypeAlias = Callable[[float], bool]
"""Takes Trio's time; true if there is no more to it than to wait for the next.

It may wake other tasks only when it returns false: before, Trio would not learn of it in time.
"""


@attrs.define(eq=False)
class _Flow:
    step: Step
    task: trio.lowlevel.Task


@attrs.define(eq=False)
class Pump(trio.abc.Instrument):
    """One for each event loop; :meth:`run` must be running.

    :param in_place: call steps where Trio would wait; else from :meth:`run`.
    """

    in_place: bool = True
    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _flows: dict[int, _Flow] = attrs.field(factory=dict, init=False)
    _token: trio.lowlevel.TrioToken | None = attrs.field(default=None, init=False)
    _turnstile: Turnstile | None = attrs.field(default=None, init=False)
    _watching: bool = attrs.field(default=False, init=False)
    _trio: int = attrs.field(default=-1, init=False)  # Trio's own descriptor, while it is watched
    _now: Callable[[], float] = attrs.field(default=trio.current_time, init=False)

    @property
    def flows(self) -> int:
        """How many streams are carried."""
        return len(self._flows)

    async def run(self) -> NoReturn:
        """Call the steps of those streams that nobody else calls."""
        self._now = trio.lowlevel.current_clock().current_time  # without a look for the event loop
        trio_epoll = _find_trio_epoll() if self.in_place else -1
        if trio_epoll >= 0:
            self._token = trio.lowlevel.current_trio_token()
            self._trio, self._turnstile = trio_epoll, turnstile()
            self._epoll.register(trio_epoll, select.EPOLLIN)
            self._watch()
            try:
                await trio.sleep_forever()
            finally:
                self._unwatch()
                self._epoll.unregister(trio_epoll)
                self._trio = -1
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self._take_turns(0.0)

    async def carry(self, sock: socket.socket, step: Step) -> None:
        """Call *step* whenever *sock* is readable, until it returns false.

        Raises what *step* raises.  Nobody else may wait for *sock* meanwhile.
        """
        descriptor = sock.fileno()
        flow = self._flows[descriptor] = _Flow(step, trio.lowlevel.current_task())
        self._epoll.register(descriptor, select.EPOLLIN)
        self._watch()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._drop(descriptor, flow)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _watch(self) -> None:
        """Be told before Trio waits: only while streams flow, as others would pay for it."""
        if self._trio >= 0 and self._flows and not self._watching:
            self._watching = True
            trio.lowlevel.add_instrument(self)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            trio.lowlevel.remove_instrument(self)

    def before_io_wait(self, timeout: float) -> None:
        """Trio is about to wait for *timeout* seconds."""
        if self._turnstile is not None and self._turnstile.is_anybody_waiting:
            self._take_turns(0.0)  # Trio has something to do, and does not know it
            return
        until = time.perf_counter() + min(timeout, _LONGEST)
        while not self._take_turns(max(0.0, until - time.perf_counter())):
            if time.perf_counter() >= until:
                if timeout > 0:
                    self._end_wait()  # it is over, and Trio would now begin it: nobody is carried
                return

    def _take_turns(self, timeout: float) -> bool:
        """Wait for something to happen; true if it is something for Trio."""
        is_for_trio = False
        events, flows = self._epoll.poll(timeout, _MOST), self._flows
        now = self._now()
        for descriptor, _ in events:
            flow = flows.get(descriptor)
            if flow is None:
                is_for_trio = is_for_trio or descriptor == self._trio
                continue
            try:
                if flow.step(now):
                    continue
                result: outcome.Outcome[None] = outcome.Value(None)
            except Exception as exc:  # belongs to whoever is carried
                result = outcome.Error(exc)
            is_for_trio = True
            self._wake(descriptor, flow, result)
        return is_for_trio or not flows

    def _wake(self, descriptor: int, flow: _Flow, result: outcome.Outcome[None]) -> None:
        if self._drop(descriptor, flow):  # else its own step has led to its being cancelled
            trio.lowlevel.reschedule(flow.task, result)
        self._end_wait()  # Trio has decided how long it sleeps, and does not know of the task yet

    def _end_wait(self) -> None:
        """Let Trio come back at once from the wait that it is about to begin."""
        if self._token is not None:
            self._token.run_sync_soon(_nothing, idempotent=True)

    def _drop(self, descriptor: int, flow: _Flow) -> bool:
        """Carry *flow* no longer; false if it is not carried any more."""
        if self._flows.get(descriptor) is not flow:
            return False
        del self._flows[descriptor]
        with suppress(OSError):  # its socket may have been closed, and is gone from here then
            self._epoll.unregister(descriptor)
        if not self._flows:
            self._unwatch()
        return True


def _nothing() -> None:
    """What Trio is woken for."""


def _find_trio_epoll() -> int:
    """The descriptor on which Trio waits, or -1."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        descriptor = GLOBAL_RUN_CONTEXT.runner.io_manager._epoll.fileno()
    except (ImportError, AttributeError):
        return -1
    return descriptor if isinstance(descriptor, int) else -1
