"""One store for many gateways, at the other end of a network: it counts what it is asked.

It decides by the policies alone, as the stores in use do; the way there and back takes time, and
what comes while a gateway's last question is on its way goes with the next, as to Redis.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NoReturn

import attrs
import orjson
import trio
from tests.support.memory_store import Memory, MemoryStore

from citadel_gateway.io.store.base import Ahead, Buckets, Grants, StoreUnavailable
from citadel_gateway.policy.board import News, Statement
from citadel_gateway.policy.rate_limit import Allowance, Refusal
from citadel_gateway.policy.shares import Need

_PATIENCE = 1.0  # seconds for anything but a request
_MOST = 256  # requests in one question


@attrs.define(eq=False)
class Server:
    """What all gateways share.

    :param way: seconds there, or back, at least; as much again comes on top by chance.
    :param calls: questions by what they are for, whichever gateway asked.
    :param takes: requests that were decided; several may come in one question.
    :param sent: bytes of statements and of news.
    :param is_away: it hears nothing and says nothing.
    """

    rng: random.Random
    way: float = 0.0003
    memory: Memory = attrs.field(factory=Memory, init=False)
    calls: Counter[str] = attrs.field(factory=Counter, init=False)
    takes: int = attrs.field(default=0, init=False)
    sent: int = attrs.field(default=0, init=False)
    is_away: bool = attrs.field(default=False, init=False)

    async def travel(self) -> None:
        await trio.sleep(self.way + self.rng.expovariate(1 / self.way))


@attrs.define(eq=False)
class _Asked:
    buckets: Buckets
    ahead: Ahead
    answered: trio.Event = attrs.field(factory=trio.Event)
    result: Allowance | Refusal | None = None


@attrs.define(eq=False)
class FarStore:
    """One gateway's way to it.

    :param patience: seconds that a request waits.
    :param is_cut: nothing of this gateway's comes through.
    """

    server: Server
    patience: float
    every: float = 0.5
    is_far: bool = attrs.field(default=True, init=False)
    is_cut: bool = attrs.field(default=False, init=False)
    _asked: list[_Asked] = attrs.field(factory=list, init=False)
    _work: trio.Event = attrs.field(factory=trio.Event, init=False)
    _policies: MemoryStore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._policies = MemoryStore(self.server.memory)

    def now(self) -> float:
        return trio.current_time()

    def take_nowait(self, _buckets: Buckets, _ahead: Ahead = (), /) -> Allowance | Refusal:
        raise StoreUnavailable("it is too far away")

    async def take(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        asked = _Asked(buckets, ahead)
        self._asked.append(asked)
        self._work.set()
        with trio.move_on_after(self.patience):
            await asked.answered.wait()
        if asked.result is None:
            raise StoreUnavailable(f"no answer within {self.patience:g} s")
        return asked.result

    async def meet(self, statement: Statement) -> News:
        async with self._called("meet"):
            news = await self._policies.meet(statement)
            self.server.sent += len(orjson.dumps(attrs.asdict(statement)))
            self.server.sent += len(orjson.dumps({**attrs.asdict(news), "won": list(news.won)}))
        return news

    async def report(self, member: str, lease: float, needs: Mapping[str, Need]) -> Grants:
        async with self._called("report"):
            return await self._policies.report(member, lease, needs)

    async def leave(self, member: str, caps: Sequence[str]) -> None:
        async with self._called("leave"):
            await self._policies.leave(member, caps)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        task_status.started()
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._asked:
                batch, self._asked = self._asked[:_MOST], self._asked[_MOST:]
                await self._ask_for(batch)

    async def _ask_for(self, batch: Sequence[_Asked]) -> None:
        try:
            async with self._called("take"):
                self.server.takes += len(batch)
                for asked in batch:
                    asked.result = self._policies.take_nowait(asked.buckets, asked.ahead)
        except StoreUnavailable:
            batch = [*batch, *self._asked]  # it is connected anew, and nobody waits for that
            self._asked.clear()
        for asked in batch:
            asked.answered.set()

    def _called(self, what: str) -> _Call:
        return _Call(self, what)


@attrs.define(eq=False)
class _Call:
    """A question: its body happens at the server, in one moment."""

    store: FarStore
    what: str

    async def __aenter__(self) -> None:
        await self._pass()
        self.store.server.calls[self.what] += 1

    async def __aexit__(self, *_: object) -> None:
        await self._pass()

    async def _pass(self) -> None:
        server = self.store.server
        if server.is_away or self.store.is_cut:
            await trio.sleep(_PATIENCE)
            raise StoreUnavailable("no answer")
        await server.travel()
