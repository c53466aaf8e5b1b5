"""The gateways of many hosts: Redis or Valkey, over coredis.

What is decided is decided by scripts inside the server, by its clock.  Requests that come while
another is on its way are sent together with the next one, so a request that asks costs a round
trip, and under load a part of one.  Nobody waits longer than he is patient; what he asked for may
then have happened all the same.

All keys have one hash tag, so that one node of a cluster has them all.  Whatever a server says
other than what it was asked for (that it is a replica, that a slot has moved) or does not say in
time is a reason to look anew for the one that has the keys.  Nothing is sent a second time, as it
may have been done the first time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, NoReturn

import attrs
import coredis
import orjson
import trio
from coredis.exceptions import NoScriptError, RedisError

from citadel_gateway.io.store.base import Ahead, Buckets, Grants, StoreUnavailable
from citadel_gateway.io.store.redis_address import RedisAddress
from citadel_gateway.policy.board import MOST_POSTS, News, Statement
from citadel_gateway.policy.rate_limit import Allowance, Refusal, TokenBucket, tightest
from citadel_gateway.policy.shares import GRACE, Grant, Need

_PATIENCE = 1.0  # seconds for a batch or a meeting; then the connection is made anew
_MOST = 256  # requests in a batch
_PAUSE = 0.25  # between two attempts to connect


@attrs.define(eq=False)
class _Asked:
    """Somebody waits to be let through."""

    buckets: Buckets
    ahead: Ahead
    answered: trio.Event = attrs.field(factory=trio.Event)
    result: Allowance | Refusal | None = None


@attrs.define(eq=False)
class RedisStore:
    """Asks one server.

    :param patience: seconds that a request waits for the server.
    :param clock: replaces the server's time.
    """

    address: RedisAddress
    prefix: str
    patience: float
    clock: Callable[[], float] | None = None
    is_far: bool = attrs.field(default=True, init=False)
    every: float = attrs.field(default=0.5, init=False)
    _client: coredis.Redis[bytes] | None = attrs.field(default=None, init=False)
    _scripts: dict[str, tuple[bytes, str]] = attrs.field(factory=dict, init=False)
    _ahead: float = attrs.field(default=0.0, init=False)  # the server's clock, of ours
    _asked: list[_Asked] = attrs.field(factory=list, init=False)
    _work: trio.Event = attrs.field(factory=trio.Event, init=False)
    _is_lost: bool = attrs.field(default=False, init=False)  # the server, or its way of answering
    _is_new: bool = attrs.field(default=True, init=False)  # nobody has met there since we connected

    def now(self) -> float:
        return self.clock() if self.clock is not None else time.monotonic() + self._ahead

    def take_nowait(self, _buckets: Buckets, _ahead: Ahead = (), /) -> Allowance | Refusal:
        raise StoreUnavailable("it is too far away")

    async def take(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        if self._client is None:
            raise StoreUnavailable("it is not connected")
        asked = _Asked(buckets, ahead or (0,) * len(buckets))
        self._asked.append(asked)
        self._work.set()
        with trio.move_on_after(self.patience):
            await asked.answered.wait()
        if asked.result is None:
            raise StoreUnavailable(f"no answer within {self.patience:g} s")
        return asked.result

    async def meet(self, statement: Statement) -> News:
        """See :meth:`Board.meet`.

        Behind a new connection there may be a replica, or what was saved some time ago, and its
        version tells nothing: what is there counts as new, and what members have said may be gone.
        """
        is_new = self._is_new
        said = attrs.asdict(statement) | ({"seen": 0} if is_new else {})
        said["posts"] = list(statement.posts.items())
        arguments = (orjson.dumps(said), MOST_POSTS)
        keys = [self._key(name) for name in ("board", "posts", "versions")]
        told = orjson.loads((await self._run("board", keys, arguments))[0])
        self._is_new = False
        return News(
            version=told["version"],
            members=told["members"],
            won=frozenset(told["won"]),
            posts=told["posts"],
            was_emptied=told["was_emptied"] or (is_new and statement.seen > 0),
        )

    async def report(self, member: str, lease: float, needs: Mapping[str, Need]) -> Grants:
        keys = [self._key("cap:" + name) for name in needs]
        arguments: list[Any] = [member, lease, GRACE]
        for need in needs.values():
            limit = -1 if need.limit is None else need.limit
            arguments += (need.cap, limit, need.used, need.wants)
        told = await self._run("shares", keys, arguments)
        return {
            name: Grant(limit=told[i], held=told[i + 1], is_contended=bool(told[i + 2]))
            for name, i in zip(needs, range(0, len(told), 3), strict=True)
        }

    async def leave(self, member: str, caps: Sequence[str]) -> None:
        await self._run("shares", [self._key("cap:" + name) for name in caps], (member, 0, GRACE))

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Stay connected, and ask for those who wait."""
        self._load_scripts()
        while True:
            try:
                async with self.address.connect(self._key("")) as client:
                    self._client, self._is_lost, self._is_new = client, False, True
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    try:
                        await self._serve()
                    finally:
                        self._client = None  # before it is closed
            except* (RedisError, OSError, trio.TooSlowError, StoreUnavailable):
                pass  # whoever asks is told so
            finally:
                self._give_up()
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(_PAUSE)

    async def _serve(self) -> NoReturn:
        """Ask for those who wait, as long as that goes well."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            if self._is_lost:
                raise StoreUnavailable("it has to be looked for")
            while self._asked:
                batch, self._asked = self._asked[:_MOST], self._asked[_MOST:]
                await self._ask_for(batch)

    def _give_up(self) -> None:
        for asked in self._asked:
            asked.answered.set()
        self._asked.clear()

    async def _ask_for(self, batch: Sequence[_Asked]) -> None:
        places: dict[bytes, int] = {}
        arguments: list[Any] = []
        for asked in batch:
            arguments.append(len(asked.buckets))
            for (_, bucket), ahead in zip(asked.buckets, asked.ahead, strict=True):
                place = places.setdefault(bucket.key, len(places) + 1)
                arguments += (place, *_numbers(bucket), ahead)
        keys = [self._key("bucket:") + key for key in places]
        try:
            told = iter(await self._run("take", keys, arguments))
            now = self.now()
            for asked in batch:
                asked.result = _result(asked.buckets, told, now)
        finally:
            for asked in batch:
                asked.answered.set()

    def _key(self, name: str) -> bytes:
        return b"{%s}:%s" % (self.prefix.encode(), name.encode())

    async def _run(self, script: str, keys: list[bytes], arguments: Sequence[Any]) -> list[Any]:
        """What *script* returns, without the time.  Raises :class:`StoreUnavailable`."""
        client = self._client
        if client is None:
            raise StoreUnavailable("it is not connected")
        text, sha = self._scripts[script]
        given = ["" if self.clock is None else repr(self.clock()), *arguments]
        try:
            with trio.fail_after(_PATIENCE):
                try:
                    told: Any = await client.evalsha(sha, keys=keys, args=given)
                except NoScriptError:
                    told = await client.eval(text, keys=keys, args=given)
        except RuntimeError as exc:
            if self._client is client:
                raise
            raise StoreUnavailable("the connection was closed meanwhile") from exc
        except (RedisError, OSError, trio.TooSlowError) as exc:
            if self._client is client:
                self._is_lost = True
                self._work.set()
            raise StoreUnavailable(str(exc) or type(exc).__name__) from exc
        self._ahead = float(told[0]) - time.monotonic()
        rest: list[Any] = told[1:]
        return rest

    def _load_scripts(self) -> None:
        for name in ("take", "board", "shares"):
            text = files("citadel_gateway.io.store").joinpath(f"{name}.lua").read_bytes()
            self._scripts[name] = (text, hashlib.sha1(text).hexdigest())  # noqa: S324  # its name


def _numbers(bucket: TokenBucket) -> tuple[str, str, str]:
    hint = bucket.tat if bucket.tat > 0 else 0.0
    return repr(1.0 / bucket.rate), repr(bucket.burst / bucket.rate), repr(hint)


def _result(buckets: Buckets, told: Any, now: float) -> Allowance | Refusal:
    """What the script's reply means for one request."""
    passed = next(told) == b"1"
    ahead = []
    for _, bucket in buckets:
        bucket.learn(float(next(told)), now)
        ahead.append(int(next(told)))
    if not passed:
        waits = [bucket.wait(now) for _, bucket in buckets]
        longest = waits.index(max(waits))
        name, bucket = buckets[longest]
        return Refusal(name, max(waits), bucket.allowance(now))
    allowance = tightest(buckets, now)
    return attrs.evolve(allowance, ahead=ahead) if any(ahead) else allowance
