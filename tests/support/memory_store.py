"""A store that is nothing but the policies: what every other one has to agree with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import attrs
import trio

from citadel_gateway.io.store.base import Ahead, Buckets, Grants, StoreUnavailable
from citadel_gateway.policy.board import Board, News, Statement
from citadel_gateway.policy.rate_limit import Allowance, Refusal, take
from citadel_gateway.policy.shares import Cap, Need


@attrs.define(eq=False)
class Memory:
    """What several of them have in common."""

    tats: dict[bytes, float] = attrs.field(factory=dict)
    board: Board = attrs.field(factory=Board)
    caps: dict[str, Cap] = attrs.field(factory=dict)

    def forget_all(self) -> None:
        self.tats.clear()
        self.caps.clear()
        self.board = Board()


@attrs.define(eq=False)
class MemoryStore:
    """One member's view of it.

    :param is_out: it cannot be asked.
    :param takes: seconds until the answer to a report is here.
    """

    memory: Memory
    clock: Callable[[], float] = trio.current_time
    every: float = 0.25
    is_far: bool = False
    is_out: bool = False
    takes: float = 0.0

    def now(self) -> float:
        return self.clock()

    def take_nowait(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        self._check()
        now = self.clock()
        for _, bucket in buckets:
            if (tat := self.memory.tats.get(bucket.key)) is not None:
                bucket.learn(tat, now)
        result = take(buckets, now, ahead)
        if isinstance(result, Allowance):
            self.memory.tats |= {bucket.key: bucket.tat for _, bucket in buckets}
        return result

    async def take(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        await trio.lowlevel.checkpoint()
        return self.take_nowait(buckets, ahead)

    async def meet(self, statement: Statement) -> News:
        await trio.lowlevel.checkpoint()
        self._check()
        return copy.deepcopy(self.memory.board.meet(statement, self.clock()))

    async def report(self, member: str, lease: float, needs: Mapping[str, Need]) -> Grants:
        await trio.lowlevel.checkpoint()
        self._check()
        now = self.clock()
        grants = {
            name: self.memory.caps.setdefault(name, Cap()).report(member, need, lease, now)
            for name, need in needs.items()
        }
        if self.takes:
            await trio.sleep(self.takes)
        return grants

    async def leave(self, member: str, caps: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        for name in caps:
            if name in self.memory.caps:
                self.memory.caps[name].leave(member)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        task_status.started()
        while True:
            await trio.sleep_forever()

    def _check(self) -> None:
        if self.is_out:
            raise StoreUnavailable("it is out")
