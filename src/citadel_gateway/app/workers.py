"""One worker, as its supervisor sees it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from enum import StrEnum
from typing import Any

import attrs
import trio

from citadel_gateway.io.channel import Channel
from citadel_gateway.io.workers import wait_exit

QUIET = 10.0
"""Seconds without a sign of life after which a worker no longer counts as well."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@attrs.define(eq=False, kw_only=True)
class Worker:
    """A process.

    :param number: from 1 on; its successors have the same one.
    :param place: in the crowd, which no other living process has.
    :param generation: of the configuration that it has.
    """

    number: int
    place: int
    pid: int
    channel: Channel
    generation: int
    began: float
    since: float = attrs.field(factory=time.time)
    state: State = State.STARTING
    heard_at: float = attrs.field(init=False)
    code: int | None = attrs.field(default=None, init=False)
    load: dict[str, int] = attrs.field(factory=dict, init=False)
    last_page: int = attrs.field(default=0, init=False)
    ready: trio.Event = attrs.field(factory=trio.Event, init=False)  # or it has ended
    ended: trio.Event = attrs.field(factory=trio.Event, init=False)

    def __attrs_post_init__(self) -> None:
        self.heard_at = self.began

    async def run(self) -> None:
        """Until its process has ended, and all that it said has been heard."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.channel.run)
                with trio.CancelScope(shield=True):  # nobody else reaps it
                    self.code = await wait_exit(self.pid)
        finally:
            self.ready.set()
            self.ended.set()

    def is_quiet(self, now: float, within: float = QUIET) -> bool:
        """Whether it has shown no sign of life for so long; it shows none while it starts."""
        return self.state is not State.STARTING and now - self.heard_at > within

    def signal(self, number: signal.Signals) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def how_it_ended(self) -> str:
        code = self.code or 0
        return f"signal {-code}" if code < 0 else f"status {code}"

    def report(self, deaths: int) -> dict[str, Any]:
        """For ``/models/status``."""
        return {
            "worker": self.number,
            "pid": self.pid,
            "state": self.state.value,
            "seconds": round(time.time() - self.since, 1),
            "replaced": deaths,
            "in_flight": self.load.get("in_flight", 0),
            "connections": self.load.get("connections", 0),
        }
