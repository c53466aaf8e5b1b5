"""A store of several Redis servers, when another one of them comes to have the data."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import permutations
from pathlib import Path

import attrs
import pytest
import trio

from citadel_gateway.io.store.base import StoreUnavailable
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.io.store.redis_address import RedisAddress
from citadel_gateway.io.store.redis_store import RedisStore
from citadel_gateway.policy.board import Statement
from citadel_gateway.policy.rate_limit import Allowance, TokenBucket
from tests.support.redis_groups import Cluster, Watched, cluster, watched
from tests.support.redis_server import RedisServer, running_redis

_SOON = 20.0  # seconds, on a machine that may be busy
_PREFIX = "test"

pytestmark = pytest.mark.filterwarnings(  # streams of connections that failed, left by coredis
    "ignore:Unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path / "group") as servers:
        yield servers
    gc.collect()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "cluster") as servers:
        yield servers
    gc.collect()


@asynccontextmanager
async def opened(url: str, **how: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(RedisAddress(url=url, **how), _PREFIX, patience=0.5)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        yield store
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(_SOON):
        while not await holds():  # noqa: ASYNC110  # it is other processes that make it so
            await trio.sleep(0.005)


async def served(store: RedisStore) -> None:
    await until(partial(is_served, store))


async def gone(store: RedisStore) -> None:
    await until(partial(is_missed, store))


async def is_missed(store: RedisStore) -> bool:
    return not await is_served(store)


async def is_served(store: RedisStore) -> bool:
    try:
        await store.meet(Statement(member="one", lease=3.0))
    except StoreUnavailable:
        return False
    return True


_BURST = 1_000_000


@attrs.define(eq=False)
class Spender:
    """Spends from a bucket that hardly fills, as fast as the store answers."""

    store: RedisStore
    bucket: TokenBucket = attrs.field(factory=lambda: TokenBucket(0.001, _BURST))
    admitted: int = 0
    missed: int = 0
    again: int = 0  # admitted since the store was missed

    async def run(self) -> None:
        self.bucket.key = b"one-for-all"
        while True:
            try:
                await self.spend()
            except StoreUnavailable:
                self.missed += 1
                await trio.sleep(0.01)

    async def spend(self) -> int:
        """What is left."""
        result = await self.store.take([("global", self.bucket)])
        assert isinstance(result, Allowance)
        self.admitted += 1
        self.again += bool(self.missed)
        return result.remaining


async def spent_before_and_after(url: str, change: Callable[[], object]) -> tuple[int, int]:
    """How much more two gateways spent than their bucket has lost, and how much since a *change*.

    Less than nothing: requests that came to nothing may have been counted.
    """
    async with opened(url) as one, opened(url) as other:
        await served(one)
        await served(other)
        spenders = [Spender(one), Spender(other)]

        async def have_begun() -> bool:
            return all(spender.admitted >= 200 for spender in spenders)

        async def go_on() -> bool:
            return all(spender.again >= 200 for spender in spenders)

        async with trio.open_nursery() as nursery:
            for spender in spenders:
                nursery.start_soon(spender.run)
            await until(have_begun)
            before = sum(spender.admitted for spender in spenders)
            await trio.to_thread.run_sync(change)
            await until(go_on)
            nursery.cancel_scope.cancel()
        left = await spenders[0].spend()
        missed = sum(spender.missed for spender in spenders) + len(spenders)
        spent = sum(spender.admitted for spender in spenders)
        more = spent - (_BURST - left)
        assert more >= -missed
        return more, spent - before


def keys(server: RedisServer) -> int:
    return int(server.command("DBSIZE").strip(":\r\n"))


# Sentinel.


async def test_the_replica_serves_when_the_primary_has_died(group: Watched) -> None:
    async with opened(group.url_with_a_dead_one) as store:
        await served(store)
        assert keys(group.primary)

        group.primary.kill()
        await gone(store)
        await served(store)

        group.primary.start()  # and does not know yet that it is the primary no more
        assert await is_served(store)
        assert "role:master" in group.replica.command("INFO", "replication")
        assert not keys(group.primary)


async def test_a_primary_that_hangs_is_not_waited_for(group: Watched) -> None:
    async with opened(group.url_with_a_dead_one) as store:
        await served(store)
        group.primary.pause()
        try:
            await gone(store)
            await served(store)
        finally:
            group.primary.resume()
        assert await is_served(store)


async def test_what_was_spent_stays_spent_when_another_server_takes_over(group: Watched) -> None:
    def fail_over() -> None:
        group.sentinel.command("SENTINEL", "FAILOVER", "main")

    more, meanwhile = await spent_before_and_after(group.url_with_a_dead_one, fail_over)

    assert "role:master" in group.replica.command("INFO", "replication")
    # For a moment one may be at the old primary and the other at the new one.  What they had spent
    # before they tell it, and of what they spent there each at least what he spent himself.
    assert more <= meanwhile / 2


async def test_a_sentinel_that_knows_no_such_service_is_no_use(group: Watched) -> None:
    url = f"redis+sentinel://127.0.0.1:{group.sentinel.port}/another"
    async with opened(url) as store:
        with pytest.raises(StoreUnavailable):
            await store.meet(Statement(member="one", lease=3.0))
        with pytest.raises(StoreUnavailable, match="No such master with that name"):
            async with store.address.connect(b"key"):
                pass


async def test_sentinels_have_a_password_of_their_own(group: Watched, tmp_path: Path) -> None:
    config = f"sentinel monitor main 127.0.0.1 {group.primary.port} 1\nrequirepass hush\n"
    with running_redis(tmp_path / "shut", "--sentinel", config=config) as sentinel:
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        async with RedisAddress(url=url, sentinel_password="hush").connect(b"key") as client:
            assert (await client.role()).role == "master"

        with pytest.raises(
            StoreUnavailable, match=r"no sentinel names the primary: .*HELLO must be called"
        ):
            async with RedisAddress(url=url).connect(b"key"):
                pass


async def test_who_is_no_primary_any_more_is_left(group: Watched, tmp_path: Path) -> None:
    config = f"sentinel monitor main 127.0.0.1 {group.primary.port} 1\n"
    with running_redis(tmp_path / "late", "--sentinel", config=config) as late:
        group.primary.command("REPLICAOF", "127.0.0.1", str(group.replica.port))
        address = RedisAddress(url=f"redis+sentinel://127.0.0.1:{late.port}/main")
        with pytest.RaisesGroup(
            pytest.RaisesExc(StoreUnavailable, match="is no primary any more"),
            flatten_subgroups=True,
        ):
            async with address.connect(b"key"):
                pass


async def test_who_knows_of_the_latest_fail_over_is_believed(
    group: Watched, tmp_path: Path
) -> None:
    with running_redis(tmp_path / "other") as other:
        config = f"sentinel monitor main 127.0.0.1 {other.port} 1\nsentinel config-epoch main 5\n"
        with running_redis(tmp_path / "newer", "--sentinel", config=config) as newer:
            for ports in permutations((group.sentinel.port, newer.port)):
                hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
                url = f"redis+sentinel://{hosts}/main"
                async with RedisAddress(url=url).connect(b"key") as client:
                    assert (await client.config_get(["port"]))[b"port"] == str(other.port).encode()


# Cluster.


async def test_the_data_is_followed_to_another_node(nodes: Cluster) -> None:
    key = "{" + _PREFIX + "}:"
    before = nodes.owner(key)
    after = next(node for node in nodes.nodes if node is not before)

    more, _ = await spent_before_and_after(
        nodes.url_with_a_dead_one, partial(nodes.move, key, after)
    )

    assert (keys(before), bool(keys(after))) == (0, True)
    assert more <= 0


async def test_a_node_that_dies_is_missed_until_it_comes_back(nodes: Cluster) -> None:
    owner = nodes.owner("{" + _PREFIX + "}:")
    async with opened(nodes.url_with_a_dead_one) as store:
        await served(store)
        owner.kill()
        await gone(store)

        owner.start()

        await served(store)


async def test_a_replica_serves_when_the_node_has_died(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster", with_replicas=True) as nodes:
        owner = nodes.owner("{" + _PREFIX + "}:")
        async with opened(nodes.url_with_a_dead_one) as store:
            await served(store)
            owner.kill()
            await gone(store)

            await served(store)

            assert keys(nodes.replica_of(owner))
    gc.collect()


# What that means to a gateway.


async def test_a_gateway_goes_by_its_share_while_another_server_is_found(group: Watched) -> None:
    told: list[bool] = []

    async def is_alone() -> bool:
        return membership.is_alone

    async def is_together() -> bool:
        return not membership.is_alone

    async def is_alone_and_serves() -> bool:
        bucket = TokenBucket(1e-6, 1000.0)
        bucket.key = b"another"
        with trio.fail_after(2.0):
            assert isinstance(await membership.take([("global", bucket)]), Allowance)
        return await is_alone()

    async with opened(group.url_with_a_dead_one) as store:
        membership = Membership(
            store, lease=3.0, patience=0.05, members=1,
            on_change=lambda is_alone, _: told.append(is_alone),
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(membership.run)
            await until(is_together)
            group.primary.kill()
            await until(is_alone_and_serves)
            await until(is_together)
            nursery.cancel_scope.cancel()

    assert told == [True, False]


# What may have been done once is not done twice.


async def test_a_request_whose_answer_is_lost_is_not_sent_again(tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis") as server:
        way = Way(server.port)
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, way.pass_on, 0)
            [listener] = await nursery.start(partial(serve, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            async with opened(f"redis://127.0.0.1:{port}") as store:
                await served(store)
                spender = Spender(store)
                spender.bucket.key = b"one"
                before = await spender.spend()

                way.cuts = True
                with pytest.raises(StoreUnavailable):
                    await spender.spend()

                await served(store)
                assert await spender.spend() == before - 2
            nursery.cancel_scope.cancel()
    gc.collect()


@attrs.define(eq=False)
class Way:
    """To a server and back.

    :param cuts: the next answer is not passed on, and the connection ends.
    """

    port: int
    cuts: bool = False

    async def pass_on(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with server, client, trio.open_nursery() as nursery:
            nursery.start_soon(self._back, server, client, nursery.cancel_scope)
            async for data in client:
                await server.send_all(data)
            nursery.cancel_scope.cancel()

    async def _back(
        self, server: trio.SocketStream, client: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        async for data in server:
            if self.cuts:
                self.cuts = False
                break
            await client.send_all(data)
        scope.cancel()
