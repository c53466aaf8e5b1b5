"""Sessions through the whole gateway: in memory, alone and among others that share a store."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.fellows import Fellows, fellows
from tests.support.gateway import World, chat, endpoint, fleet, gather, running_gateway
from tests.support.raw_client import RawResponse
from tests.support.scripted_engine import Script, close, hang, sleep, status, whole_chat
from tests.unit.test_generations import adopt

FOUR = ["a", "b", "c", "d"]
HEARD = 1.5  # seconds in which everybody has met everybody, and told what it knows

both = pytest.mark.parametrize("algorithm", ["consistent_hash", "session_affinity"])


def sticky(models: Any, algorithm: str = "session_affinity", **balancing: Any) -> Any:
    return fleet(
        models, load_balancer={"algorithm": algorithm, "slow_start": 0, "unhealthy_after": 1,
                               "retry_budget_floor": 1000, **balancing},
    )  # fmt: skip


def host(response: RawResponse) -> str:
    assert response.status == 200, response.body
    return (response.header("x-citadel-backend") or "").removeprefix("http://").partition(":")[0]


async def say(world: World, session: str, model: str | None = "m", **fields: Any) -> str:
    """Who answers a request of *session*."""
    return host(await world.ask(model, [("X-Session-ID", session)], **fields))


async def sessions_at(world: World, place: str, count: int) -> list[str]:
    """So many that are at home there."""
    found: list[str] = []
    for n in range(1000):
        if await say(world, f"one{n}") == place:
            found.append(f"one{n}")
            if len(found) == count:
                return found
    raise AssertionError("nobody is at home there")


async def take_down(several: Fellows | World, name: str) -> None:
    several.engines[name].routes["GET", "/health"] = status(500)
    several.engines[name].default = Script([close()])


async def put_back(several: Fellows | World, name: str) -> None:
    several.engines[name].routes["GET", "/health"] = status(200)
    several.engines[name].default = whole_chat("ok")
    await trio.sleep(40)


@both
async def test_requests_of_a_session_have_one_endpoint_and_sessions_are_spread(
    autojump_clock: MockClock, algorithm: str
) -> None:
    async with running_gateway(sticky({"m": FOUR}, algorithm)) as world:
        first = [await say(world, str(n)) for n in range(40)]
        again = [await say(world, str(n)) for n in range(40)]

    assert again == first
    assert set(first) == set(FOUR)


@both
async def test_a_session_is_told_by_the_header_by_the_body_or_by_how_it_began(
    autojump_clock: MockClock, algorithm: str
) -> None:
    async with running_gateway(sticky({"m": FOUR}, algorithm)) as world:
        for n in range(8):
            beginning = [{"role": "system", "content": "be"}, {"role": "user", "content": str(n)}]
            more = [*beginning, {"role": "assistant", "content": "x"}, beginning[1]]
            here = await say(world, f"s{n}")
            assert await say(world, f"s{n}", user="another", messages=more) == here
            assert host(await world.ask("m", user=f"s{n}")) == here
            grown = [host(await world.ask("m", messages=m)) for m in (beginning, more)]
            assert grown[0] == grown[1]


async def test_another_header_may_name_the_session_and_it_is_passed_on(
    autojump_clock: MockClock,
) -> None:
    config = sticky({"m": FOUR}, session_header="X-OpenWebUI-Chat-Id")
    async with running_gateway(config) as world:
        by = [("X-OpenWebUI-Chat-Id", "c1"), ("X-Session-ID", "s1"), ("Cookie", "k")]
        found = {host(await world.ask("m", by, user=str(n))) for n in range(6)}
        headers = world.posts[0].headers

    assert len(found) == 1
    assert headers["x-openwebui-chat-id"] == "c1"
    assert headers.keys().isdisjoint({"x-session-id", "cookie"})


async def test_it_is_foretold_where_a_session_would_go(autojump_clock: MockClock) -> None:
    async with running_gateway(sticky({"m": FOUR})) as world:
        moved = [("X-Session-ID", "moved")]
        first = await say(world, "moved")
        await take_down(world, first)
        await say(world, "moved")
        await put_back(world, first)
        for headers, user in ((moved, "x"), ([], "1"), ([], "2"), ([], "3")):
            body = {**chat("m"), "user": user}
            report = (await world.send("POST", "/models/route", body, headers)).json()
            answer = await world.ask("m", headers, user=user)

            assert report["would_pick"]["endpoint"] == answer.header("x-citadel-backend")


async def test_the_name_of_a_session_is_neither_logged_nor_counted_by(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(sticky({"m": FOUR})) as world:
        await say(world, "secret-session")
        await take_down(world, world.posts[0].headers["host"].partition(":")[0])
        await say(world, "secret-session")

        assert "secret-session" not in await world.metrics_page()
        assert b"secret-session" not in orjson.dumps(world.log.lines)


@both
async def test_a_dead_endpoint_is_no_trap_for_its_sessions(
    autojump_clock: MockClock, algorithm: str
) -> None:
    """It is not even known yet that it is dead."""
    async with running_gateway(sticky({"m": FOUR}, algorithm)) as world:
        dead = await say(world, "s")
        await take_down(world, dead)
        answers = await gather(*[lambda: say(world, "s")] * 20)
        later = [await say(world, "s") for _ in range(20)]

        assert dead not in answers
        assert len(set(later)) == 1
        assert len(world.engines[dead].posts) <= 21


async def test_a_session_that_has_moved_does_not_go_back(autojump_clock: MockClock) -> None:
    async with running_gateway(sticky({"m": FOUR})) as world:
        first = await say(world, "s")
        await take_down(world, first)
        second = await say(world, "s")
        await put_back(world, first)

        assert await say(world, "s") == second != first


async def test_a_session_stays_also_through_a_reload_that_brings_more_endpoints(
    autojump_clock: MockClock,
) -> None:
    sessions = [str(n) for n in range(30)]
    more = [*FOUR, "e", "f"]
    async with running_gateway(sticky({"m": FOUR}), hosts=more) as world:
        first = await say(world, "moved")
        await take_down(world, first)
        second = await say(world, "moved")
        await put_back(world, first)
        before = [await say(world, session) for session in sessions]
        await adopt(world, sticky({"m": more}, session_ttl=100))

        assert await say(world, "moved") == second
        assert [await say(world, session) for session in sessions] == before
        assert "e" in {await say(world, f"new{n}") for n in range(30)}
        await trio.sleep(200)
        assert await say(world, "moved") != second  # forgotten, so it begins at home


async def test_another_algorithm_takes_over_with_those_who_wait(autojump_clock: MockClock) -> None:
    config = sticky({"m": {"endpoints": [{"url": endpoint("a"), "max_concurrent": 1}]}})
    other = sticky(
        {"m": {"endpoints": [{"url": endpoint("a"), "max_concurrent": 1}]}}, "round_robin"
    )
    async with running_gateway(config) as world, trio.open_nursery() as nursery:
        world.engines["a"].default = Script([sleep(1), *whole_chat("ok").steps])
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await say(world, "s"))

        for _ in range(3):
            nursery.start_soon(ask)
        await trio.sleep(0.5)
        await adopt(world, other)
        await trio.sleep(3)
        await adopt(world, config)
        await ask()

    assert answers == ["a"] * 4


@both
async def test_who_waits_for_a_seat_gets_the_sessions_endpoint(
    autojump_clock: MockClock, algorithm: str
) -> None:
    config = sticky({"m": FOUR}, algorithm)
    config["performance"]["max_concurrent_requests"] = 1
    async with running_gateway(config) as world, trio.open_nursery() as nursery:
        home = await say(world, "s")
        others = [name for name in map(str, range(20)) if await say(world, name) != home]
        for name in FOUR:
            world.engines[name].default = Script([sleep(5), *whole_chat("ok").steps])
        nursery.start_soon(say, world, others[0])
        await trio.sleep(1)
        found: list[str] = []

        async def ask() -> None:
            found.append(await say(world, "s"))

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert found == []
        await trio.sleep(20)

    assert found == [home]


@both
async def test_the_fallback_keeps_sessions_together_too(
    autojump_clock: MockClock, algorithm: str
) -> None:
    models = {"m": {"endpoint": endpoint("x"), "fallbacks": ["n"]}, "n": FOUR}
    async with running_gateway(sticky(models, algorithm)) as world:
        world.engines["x"].default = status(503)
        found = {n: {await say(world, str(n)) for _ in range(4)} for n in range(10)}

    assert all(len(places) == 1 for places in found.values())
    assert len(set.union(*found.values())) > 1


@both
async def test_requests_for_any_model_keep_theirs(
    autojump_clock: MockClock, algorithm: str
) -> None:
    async with running_gateway(sticky({"m": ["a", "b"], "n": ["c", "d"]}, algorithm)) as world:
        found = {n: {await say(world, str(n), None) for _ in range(4)} for n in range(20)}
        response = await world.ask(None, [("X-Session-ID", "1")])

    assert all(len(places) == 1 for places in found.values())
    assert set.union(*found.values()) == set(FOUR)
    assert response.header("x-citadel-route-reason") == f"auto:{algorithm}"


async def test_a_hedge_goes_to_another_endpoint_and_the_session_stays(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"endpoints": [{"url": endpoint(h)} for h in FOUR], "hedge": True,
                    "hedge_after": 0.2}}  # fmt: skip
    async with running_gateway(sticky(models)) as world:
        home = await say(world, "s")
        world.engines[home].default = Script([hang()])
        other = await say(world, "s", stream=True)
        world.engines[home].default = whole_chat("ok")

        assert other != home
        assert await say(world, "s") == home


async def test_embeddings_without_a_session_are_spread(autojump_clock: MockClock) -> None:
    async with running_gateway(sticky({"m": FOUR})) as world:
        for engine in world.engines.values():
            engine.default = whole_chat("ok")
        for _ in range(40):
            await world.send("POST", "/v1/embeddings", {"model": "m", "input": "x"})
        asked = Counter({name: len(engine.posts) for name, engine in world.engines.items()})

    assert set(+asked) == set(FOUR)


async def test_a_session_has_a_place_with_each_model(autojump_clock: MockClock) -> None:
    async with running_gateway(sticky({"m": FOUR, "n": ["e", "f"]})) as world:
        first = await say(world, "s")
        await take_down(world, first)
        second = await say(world, "s")
        await put_back(world, first)
        await say(world, "s", "n")

        assert await say(world, "s") == second


@both
async def test_heavier_endpoints_have_more_sessions(
    autojump_clock: MockClock, algorithm: str
) -> None:
    models = {"m": {"endpoints": [{"url": endpoint("a"), "weight": 2},
                                  {"url": endpoint("b"), "weight": 8}]}}  # fmt: skip
    async with running_gateway(sticky(models, algorithm)) as world:
        found = Counter([await say(world, str(n)) for n in range(100)])

    assert 70 <= found["b"] <= 90


# Several gateways with one store.


@both
async def test_gateways_agree_without_telling_each_other_anything(
    autojump_clock: MockClock, algorithm: str
) -> None:
    async with fellows(sticky({"m": FOUR}, algorithm), 4, FOUR) as several:
        found = {n: {await say(world, str(n)) for world in several} for n in range(20)}
        await trio.sleep(HEARD)
        own = {world.service.membership.name for world in several}

        assert all(len(places) == 1 for places in found.values())
        assert own.isdisjoint(several.memory.board.posts)


async def test_a_session_that_has_moved_has_moved_for_all_gateways(
    autojump_clock: MockClock,
) -> None:
    async with fellows(sticky({"m": FOUR}), 3, FOUR) as several:
        first = {await say(world, "s") for world in several}
        (home,) = first
        await take_down(several, home)
        second = await say(several[1], "s")
        await put_back(several, home)

        assert {await say(world, "s") for world in several} == {second}
        assert second != home


async def test_a_gateway_that_comes_later_hears_of_the_sessions_that_are_in_use(
    autojump_clock: MockClock,
) -> None:
    async with fellows(sticky({"m": FOUR}), 2, FOUR) as several:
        several.stores[1].is_out = True
        home = await say(several[0], "s")
        moved = {}
        for session in ["s", *await sessions_at(several[0], home, 1)]:
            await take_down(several, home)
            moved[session] = await say(several[0], session)
            await put_back(several, home)
        several.stores[1].is_out = False
        await trio.sleep(HEARD)
        assert await say(several[1], "s") == home  # it has missed what was said first
        await trio.sleep(60)
        await say(several[0], "s")
        await trio.sleep(HEARD)

        assert await say(several[1], "s") == moved["s"] != home


async def test_without_the_store_each_goes_by_what_it_knows_and_tells_it_afterwards(
    autojump_clock: MockClock,
) -> None:
    async with fellows(sticky({"m": FOUR}), 2, FOUR) as several:
        home = await say(several[0], "s")
        for store in several.stores:
            store.is_out = True
        await trio.sleep(10)
        moved = {}
        for session in await sessions_at(several[0], home, 2):  # one long after the other
            await take_down(several, home)
            moved[session] = await say(several[0], session)
            await put_back(several, home)
        for store in several.stores:
            store.is_out = False
        await trio.sleep(HEARD)

        assert {session: await say(several[1], session) for session in moved} == moved


async def test_more_moves_than_fit_into_one_meeting_are_told_in_several(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("citadel_gateway.app.session_news._PORTION", 5)
    async with fellows(sticky({"m": FOUR}), 2, FOUR) as several:
        sessions = [str(n) for n in range(60)]
        await take_down(several, "a")
        moved = {session: await say(several[0], session) for session in sessions}
        assert "a" not in moved.values()
        name = several[0].service.membership.name  # type: ignore[union-attr]
        steps = [0]  # how many were told in the first two seconds
        for _ in range(200):
            await trio.sleep(0.01)
            told = orjson.loads(several.memory.board.posts[name][1].partition(" ")[2])
            steps.append(sum(map(len, told.values())))
        assert max(later - earlier for earlier, later in pairwise(steps)) == 5
        await put_back(several, "a")
        await trio.sleep(10)

        assert {session: await say(several[1], session) for session in sessions} == moved


async def test_what_is_decided_after_something_was_heard_counts_more_whatever_the_clocks_say(
    autojump_clock: MockClock,
) -> None:
    async with fellows(sticky({"m": FOUR}), 2, FOUR) as several:
        home = await say(several[0], "s")
        membership = several[0].service.membership
        assert membership is not None
        heard = int((membership.now() + 3600) * 1000) << 16
        membership.on_bulletin(orjson.dumps({"nowhere": [[1, heard]]}).decode())
        await take_down(several, home)
        await say(several[0], "s")
        await trio.sleep(HEARD)

        said = several.memory.board.posts[membership.name][1].partition(" ")[2]
        (((_, stamp),),) = orjson.loads(said).values()
        assert stamp > heard


async def test_what_a_gateway_has_told_goes_with_it(autojump_clock: MockClock) -> None:
    async with fellows(sticky({"m": FOUR}), 2, FOUR) as several:
        home = await say(several[0], "s")
        await take_down(several, home)
        await say(several[0], "s")
        await trio.sleep(HEARD)
        name = several[0].service.membership.name  # type: ignore[union-attr]
        assert name in several.memory.board.posts
        several.stores[0].is_out = True
        await trio.sleep(10)

        assert name not in several.memory.board.posts
