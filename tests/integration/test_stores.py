"""What every store has to do, asked of each: the policies alone, LMDB, and real Redis servers."""

from __future__ import annotations

import gc
import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import pytest
import trio
import trio.lowlevel
import trustme

from citadel_gateway.io.store import redis_store
from citadel_gateway.io.store.base import Store, StoreUnavailable
from citadel_gateway.io.store.lmdb_store import LmdbStore
from citadel_gateway.io.store.redis_address import RedisAddress
from citadel_gateway.io.store.redis_store import RedisStore
from citadel_gateway.policy import board
from citadel_gateway.policy.board import Statement
from citadel_gateway.policy.rate_limit import Allowance, Refusal, TokenBucket
from citadel_gateway.policy.shares import GRACE, Grant, Need
from tests.support.memory_store import Memory, MemoryStore
from tests.support.redis_groups import Cluster, Watched, cluster, watched
from tests.support.redis_server import RedisServer, free_port, running_redis

LEASE = 3.0
_PATIENCE = 5.0  # seconds, on a machine that may be busy


@attrs.define
class Clock:
    """The store's time, as the test wants it; it begins where Redis's own may be."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


Opening: TypeAlias = "Callable[[Clock], Any]"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("group")) as servers:
        yield servers


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@asynccontextmanager
async def opened(store: Any) -> AsyncIterator[Store]:
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        if isinstance(store, RedisStore):
            await connected(store)
        yield store
        nursery.cancel_scope.cancel()


async def connected(store: Store) -> None:
    with trio.fail_after(_PATIENCE):
        while True:
            try:
                await store.meet(Statement(member="first", lease=0.0))
            except StoreUnavailable:
                await trio.sleep(0.01)
            else:
                return


@pytest.fixture(params=["memory", "lmdb", "redis", "sentinel", "cluster"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Opening:
    """Makes stores that are one: every call is another member's."""
    match request.param:
        case "memory":
            memory = Memory()
            return lambda clock: opened(MemoryStore(memory, clock))
        case "lmdb":
            return partial(_lmdb_store, tmp_path, [])
        case "sentinel":
            group = request.getfixturevalue("group")
            group.primary.command("FLUSHALL")
            return partial(_redis_store, RedisAddress(url=group.url))
        case "cluster":
            nodes = request.getfixturevalue("nodes")
            nodes.owner("{test}:").command("FLUSHALL")
            return partial(_redis_store, RedisAddress(url=nodes.url))
        case _:
            redis = request.getfixturevalue("redis")
            redis.command("FLUSHALL")
            return partial(_redis_store, RedisAddress(url=redis.url))


@asynccontextmanager
async def _lmdb_store(folder: Path, open_: list[Store], clock: Clock) -> AsyncIterator[Store]:
    if open_:  # a process has it open once
        yield open_[0]
        return
    async with opened(LmdbStore(folder, _PATIENCE, clock)) as store:
        open_.append(store)
        yield store


def _redis_store(address: RedisAddress, clock: Clock) -> Any:
    return opened(RedisStore(address, "test", _PATIENCE, clock))


def bucket(key: bytes, rate: float, burst: float) -> TokenBucket:
    made = TokenBucket(rate, burst)
    made.key = key
    return made


# Limits.


async def test_two_members_spend_from_one_bucket(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as one, make(clock) as other:
        mine, its = bucket(b"global", 2.0, 5.0), bucket(b"global", 2.0, 5.0)

        taken = [await store.take([("global", b)]) for store, b in [(one, mine), (other, its)] * 3]

        assert [isinstance(result, Allowance) for result in taken] == [True] * 5 + [False]
        assert isinstance(taken[4], Allowance)
        assert taken[4].remaining == 0
        assert isinstance(taken[5], Refusal)
        assert taken[5].retry_after == pytest.approx(0.5, abs=1e-5)
        clock.now += 0.5
        assert isinstance(await other.take([("global", its)]), Allowance)
        assert isinstance(await one.take([("global", mine)]), Refusal)


async def test_who_is_refused_by_one_bucket_pays_no_other(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        wide, narrow = bucket(b"wide", 1.0, 3.0), bucket(b"narrow", 0.5, 1.0)
        both = [("global", wide), ("key", narrow)]
        assert isinstance(await store.take(both), Allowance)

        refused = [await store.take(both) for _ in range(5)]

        assert {r.limit for r in refused if isinstance(r, Refusal)} == {"key"}
        assert refused[0].retry_after == pytest.approx(2.0, abs=1e-5)
        left = await store.take([("global", bucket(b"wide", 1.0, 3.0))])
        assert isinstance(left, Allowance)
        assert left.remaining == 1


async def test_a_store_that_lost_everything_is_told_how_empty_buckets_were(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        mine = bucket(b"lost", 1.0, 2.0)
        mine.tat = clock.now + 2.0  # as this member saw it

        assert isinstance(await store.take([("global", mine)]), Refusal)


async def test_no_bucket_is_emptier_than_empty_though_clocks_go_back(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        assert isinstance(await store.take([("g", bucket(b"back", 1.0, 2.0))]), Allowance)
        clock.now -= 3600.0

        refused = await store.take([("g", bucket(b"back", 1.0, 2.0))])

        assert isinstance(refused, Refusal)
        assert refused.retry_after == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
async def test_all_stores_let_the_same_requests_through(make: Opening, seed: int) -> None:
    rng, clock, model = random.Random(seed), Clock(), Memory()
    reference = MemoryStore(model, clock)
    shapes = [(b"a", 3.0, 7.0), (b"b", 50.0, 10.0), (b"c", 0.7, 1.0)]
    ours = [bucket(*shape) for shape in shapes]
    theirs = [bucket(*shape) for shape in shapes]
    async with make(clock) as store:
        for _ in range(150):
            clock.now += rng.choice([0.0, 0.001, rng.random(), 3 * rng.random()])
            chosen = rng.sample(range(3), rng.randint(1, 3))

            got = await store.take([(str(i), ours[i]) for i in chosen])
            expected = await reference.take([(str(i), theirs[i]) for i in chosen])

            assert type(got) is type(expected)
            if isinstance(got, Allowance) and isinstance(expected, Allowance):
                assert (got.limit, got.remaining) == (expected.limit, expected.remaining)
                assert got.reset == pytest.approx(expected.reset, abs=1e-5)
            elif isinstance(got, Refusal) and isinstance(expected, Refusal):
                assert got.limit == expected.limit
                assert got.retry_after == pytest.approx(expected.retry_after, abs=1e-5)


async def test_many_at_once_get_exactly_what_there_is(make: Opening) -> None:
    clock = Clock()
    results: list[Allowance | Refusal] = []

    async def ask(store: Store) -> None:
        results.append(await store.take([("global", bucket(b"many", 1.0, 100.0))]))

    async with make(clock) as one, make(clock) as other, trio.open_nursery() as nursery:
        for i in range(300):
            nursery.start_soon(ask, (one, other)[i % 2])

    assert sum(isinstance(result, Allowance) for result in results) == 100


@pytest.mark.parametrize("seed", range(5))
async def test_all_stores_lease_the_same_units(make: Opening, seed: int) -> None:
    rng, clock, model = random.Random(seed), Clock(), Memory()
    reference = MemoryStore(model, clock)
    shapes = [(b"a", 1000.0, 500.0), (b"b", 50.0, 250.0), (b"c", 300.0, 40.0)]
    ours = [bucket(*shape) for shape in shapes]
    theirs = [bucket(*shape) for shape in shapes]
    leased = 0
    async with make(clock) as store:
        for _ in range(150):
            clock.now += rng.choice([0.0, 0.001, 0.05, rng.random() / 4])
            chosen = rng.sample(range(3), rng.randint(1, 3))
            ahead = [rng.choice([0, 1, 7, 50]) for _ in chosen]

            got = await store.take([(str(i), ours[i]) for i in chosen], ahead)
            expected = await reference.take([(str(i), theirs[i]) for i in chosen], ahead)

            assert type(got) is type(expected)
            for i in chosen:
                assert ours[i].tat == pytest.approx(theirs[i].tat, abs=1e-5)
            if isinstance(got, Allowance) and isinstance(expected, Allowance):
                assert list(got.ahead or [0] * len(chosen)) == list(expected.ahead)
                leased += sum(got.ahead)
    assert leased


# What members know together.


def says(member: str, **what: Any) -> Statement:
    return Statement(member=member, lease=what.pop("lease", LEASE), **what)


async def test_a_task_has_one_holder_until_he_stays_away(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as one, make(clock) as other:
        claims = ("probe a", "probe b")
        assert (await one.meet(says("one", claims=claims))).won == set(claims)
        assert (await other.meet(says("other", claims=claims))).won == set()
        clock.now += LEASE - 0.1
        assert (await one.meet(says("one", claims=claims))).won == set(claims)
        clock.now += LEASE - 0.1
        assert (await other.meet(says("other", claims=claims))).won == set()

        clock.now += 0.2
        news = await other.meet(says("other", claims=claims))

        assert news.won == set(claims)
        assert news.members == 1
        assert (await one.meet(says("one", claims=claims))).won == set()


async def test_a_task_is_free_once_it_is_not_claimed_any_more(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.meet(says("one", claims=("probe a", "probe b")))

        await store.meet(says("one", claims=("probe b",)))

        assert (await store.meet(says("other", claims=("probe a", "probe b")))).won == {"probe a"}


async def test_who_leaves_holds_nothing(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.meet(says("one", claims=("probe a",)))
        assert (await store.meet(says("other"))).members == 2

        await store.meet(says("one", lease=0.0))

        news = await store.meet(says("other", claims=("probe a",)))
        assert (news.won, news.members) == ({"probe a"}, 1)


async def test_posts_are_heard_once_and_the_last_one_counts(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.meet(says("one", posts={"health a": "ill", "health b": "é\n"}))
        await store.meet(says("one", posts={"health a": "well"}))

        news = await store.meet(says("other"))

        assert news.posts == {"health a": "well", "health b": "é\n"}
        assert (await store.meet(says("other", seen=news.version))).posts == {}
        later = await store.meet(says("one", posts={"health b": "gone"}))
        assert later.version > news.version
        heard = await store.meet(says("other", seen=news.version))
        assert heard.posts == {"health b": "gone"}
        assert not heard.was_emptied


async def test_of_too_many_posts_the_oldest_are_forgotten(
    make: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "MOST_POSTS", 3)
    monkeypatch.setattr(redis_store, "MOST_POSTS", 3)
    async with make(Clock()) as store:
        for number in range(5):
            await store.meet(says("one", posts={f"health {number}": "well"}))
        await store.meet(says("one", posts={"health 2": "ill"}))
        await store.meet(says("one", posts={"health 5": "well"}))

        news = await store.meet(says("other"))

        assert news.posts == {"health 4": "well", "health 2": "ill", "health 5": "well"}


async def test_what_a_member_posts_under_its_own_name_goes_with_it(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        for member in ("one", "two", "three"):
            await store.meet(says(member, posts={member: "text", f"of {member}": "stays"}))
        assert {"one", "two", "three"} < (await store.meet(says("other"))).posts.keys()

        await store.meet(says("one", lease=0.0))
        clock.now += LEASE - 0.1
        await store.meet(says("two"))
        clock.now += 0.2

        news = await store.meet(says("other"))
        assert news.posts.keys() == {"two", "of one", "of two", "of three"}


async def test_what_was_posted_goes_with_the_last_who_could_have_taken_it_back(
    make: Opening,
) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.meet(says("one", posts={"cordon a": "yes"}))
        clock.now += LEASE - 0.1
        seen = (await store.meet(says("two"))).version
        clock.now += 0.2
        assert (await store.meet(says("other"))).posts == {"cordon a": "yes"}
        clock.now += LEASE + 0.1

        assert (await store.meet(says("late"))).posts == {}
        back = await store.meet(says("two", seen=seen, posts={"cordon b": "yes"}))
        assert back.was_emptied
        assert not (await store.meet(says("two", seen=back.version))).was_emptied
        assert (await store.meet(says("late", seen=seen))).posts == {"cordon b": "yes"}


async def test_members_notice_that_the_board_was_emptied(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.meet(says("one", posts={"health a": "well"}))

        news = await store.meet(says("other", seen=1000))

        assert news.was_emptied
        assert news.posts == {"health a": "well"}


async def test_nothing_is_held_for_longer_than_a_lease_though_clocks_go_back(
    make: Opening,
) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.meet(says("dead", claims=("probe a",)))
        clock.now -= 3600.0
        assert (await store.meet(says("one", claims=("probe a",)))).won == set()
        clock.now += LEASE - 0.1
        await store.meet(says("one", claims=("probe a",)))
        clock.now += 0.1

        news = await store.meet(says("one", claims=("probe a",)))

        assert (news.won, news.members) == ({"probe a"}, 1)


# Caps.


async def test_what_is_held_together_is_never_more_than_the_cap(make: Opening) -> None:
    async with make(Clock()) as store:
        one = await store.report("one", LEASE, {"all": Need(10, None, 0, 8)})
        other = await store.report("other", LEASE, {"all": Need(10, None, 0, 8)})

        assert one["all"] == Grant(limit=9, held=9, is_contended=False)
        assert other["all"] == Grant(limit=1, held=1, is_contended=False)
        told = await store.report("one", LEASE, {"all": Need(10, 9, 8, 0)})
        assert told["all"] == Grant(limit=5, held=9, is_contended=True)
        told = await store.report("one", LEASE, {"all": Need(10, 5, 8, 0)})  # it has heard that
        assert told["all"] == Grant(limit=5, held=8, is_contended=True)


async def test_a_dead_members_share_comes_back(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.report("one", LEASE, {"all": Need(4, None, 0, 4)})
        assert (await store.report("other", LEASE, {"all": Need(4, None, 0, 4)}))["all"].limit == 0

        for pause in (LEASE / 2, LEASE / 2 - 0.1):  # somebody reports, so the store was there
            clock.now += pause
            needs = {"all": Need(4, 0, 0, 4)}
            assert (await store.report("other", LEASE, needs))["all"].limit == 0

        clock.now += 0.1

        assert (await store.report("other", LEASE, {"all": Need(4, 0, 0, 4)}))["all"].limit == 4


async def test_who_leaves_gives_its_shares_back(make: Opening) -> None:
    async with make(Clock()) as store:
        await store.report("one", LEASE, {"a": Need(4, None, 0, 4), "b": Need(4, None, 0, 4)})

        await store.leave("one", ["a", "b"])

        needs = {"a": Need(4, None, 0, 4), "b": Need(4, None, 0, 4)}
        told = await store.report("other", LEASE, needs)
        assert {name: grant.limit for name, grant in told.items()} == {"a": 4, "b": 4}


async def test_after_a_loss_nobody_gets_more_until_all_have_said_what_they_have(
    make: Opening,
) -> None:
    clock = Clock()
    async with make(clock) as store:  # which has lost everything
        told = await store.report("one", LEASE, {"all": Need(10, 4, 4, 6)})
        assert told["all"].limit == 4
        told = await store.report("new", LEASE, {"all": Need(10, None, 0, 6)})
        assert told["all"].limit == 0
        told = await store.report("other", LEASE, {"all": Need(10, 6, 6, 0)})
        assert (told["all"].limit, told["all"].held) == (3, 6)

        clock.now += GRACE
        told = await store.report("other", LEASE, {"all": Need(10, 3, 2, 0)})
        assert told["all"] == Grant(limit=2, held=3, is_contended=True)
        told = await store.report("other", LEASE, {"all": Need(10, 2, 2, 0)})
        assert told["all"] == Grant(limit=2, held=2, is_contended=True)
        told = await store.report("new", LEASE, {"all": Need(10, 0, 0, 6)})
        assert told["all"].limit == 4


@pytest.mark.parametrize("seed", range(5))
async def test_all_stores_share_out_the_same(make: Opening, seed: int) -> None:
    rng, clock, model = random.Random(seed), Clock(), Memory()
    reference = MemoryStore(model, clock)
    members = ("m1", "m2", "m3", "m4")
    limits: dict[str, dict[str, int | None]] = {m: dict.fromkeys("ab") for m in members}
    async with make(clock) as store:
        for _ in range(150):
            clock.now += rng.choice([0.0, 0.25, rng.random(), 2.0])
            member = rng.choice(list(limits))
            needs = {}
            for cap in rng.sample("ab", rng.randint(1, 2)):
                had = limits[member][cap]
                needs[cap] = Need(7, had, rng.randint(0, had or 0), rng.randint(0, 4))

            got = await store.report(member, LEASE, needs)

            assert got == await reference.report(member, LEASE, needs)
            for cap, grant in got.items():
                limits[member][cap] = grant.limit


async def test_a_dead_members_share_comes_back_though_clocks_go_back(make: Opening) -> None:
    clock = Clock()
    async with make(clock) as store:
        await store.report("dead", LEASE, {"all": Need(4, None, 0, 4)})
        clock.now -= 3600.0
        assert (await store.report("one", LEASE, {"all": Need(4, None, 0, 4)}))["all"].limit == 0

        for _ in range(4):
            clock.now += LEASE / 4
            told = await store.report("one", LEASE, {"all": Need(4, 0, 0, 4)})

        assert told["all"].limit == 4


# How Redis is reached.


async def _cannot_be_reached(store: RedisStore) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        with pytest.raises(StoreUnavailable):
            await store.meet(says("one"))
        nursery.cancel_scope.cancel()
    gc.collect()  # coredis leaves streams of connections that failed to the collector, which warns


_LEFT_OPEN = pytest.mark.filterwarnings(
    "ignore:Unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@_LEFT_OPEN
async def test_who_asks_a_redis_that_was_just_lost_is_told_so(tmp_path: Path) -> None:
    told: list[str] = []

    async def ask(store: RedisStore, number: int) -> None:
        try:
            await store.report(f"member {number}", LEASE, {"all": Need(4, None, 0, 1)})
        except StoreUnavailable:
            told.append("unavailable")

    async def take(store: RedisStore) -> None:
        with pytest.raises(StoreUnavailable):
            await store.take([("global", bucket(b"global", 10, 10))])

    with running_redis(tmp_path / "redis") as server:
        store = RedisStore(RedisAddress(url=server.url), "test", patience=0.02)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            server.pause()
            for number in range(6):
                nursery.start_soon(ask, store, number)
            await take(store)
            server.kill()
            for number in range(6, 12):
                nursery.start_soon(ask, store, number)
                await trio.lowlevel.checkpoint()
            with trio.move_on_after(10.0):
                while len(told) < 12:  # noqa: ASYNC110  # they are many
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    gc.collect()

    assert told == ["unavailable"] * 12


@_LEFT_OPEN
async def test_redis_may_ask_for_a_password(tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis", "--requirepass", "secret") as server:
        right = RedisStore(RedisAddress(url=server.url, password="secret"), "test", _PATIENCE)
        async with opened(right) as store:
            assert (await store.meet(says("one"))).members == 1

        wrong = RedisStore(RedisAddress(url=server.url, password="guess"), "test", _PATIENCE)
        await _cannot_be_reached(wrong)


@_LEFT_OPEN
async def test_redis_is_reached_over_tls_and_its_certificate_is_verified(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    port = free_port()
    options = ("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(ca),
               "--tls-cert-file", str(cert), "--tls-key-file", str(key))  # fmt: skip
    url = f"rediss://localhost:{port}"
    with running_redis(tmp_path / "redis", *options):
        trusting = ssl.create_default_context(cafile=ca)
        right = RedisStore(RedisAddress(url=url, tls=trusting), "test", _PATIENCE)
        async with opened(right) as store:
            assert (await store.meet(says("one"))).members == 1

        strict = ssl.create_default_context()
        wrong = RedisStore(RedisAddress(url=url, tls=strict), "test", _PATIENCE)
        await _cannot_be_reached(wrong)
