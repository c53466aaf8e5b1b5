"""Models that backends list are served for as long as they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.config.loader import ConfigError, parse
from citadel_gateway.config.share import portion_of
from citadel_gateway.wire.model_list import MOST, read_model_names
from tests.support import scripted_engine as engines
from tests.support.gateway import World, endpoint, fleet, gather, running_gateway
from tests.support.scripted_engine import Script
from tests.unit.test_routing import host

NOTICED = 13.0  # seconds: a round of questions, and a probe


def listing(*names: str) -> Script:
    cards = [{"id": name, "object": "model"} for name in names]
    return engines.status(200, orjson.dumps({"object": "list", "data": cards}))


def backends(*hosts: str, models: Any = None, **sections: Any) -> Any:
    raw = fleet(models or {}, **sections)
    raw["backends"] = [{"url": endpoint(each)} for each in hosts]
    if not raw["models"]:
        del raw["models"]
    return raw


def say(world: World, name: str, script: Script) -> None:
    world.engines[name].routes["GET", "/v1/models"] = script


@asynccontextmanager
async def running(config: Any, **lists: tuple[str, ...]) -> AsyncIterator[World]:
    """A gateway whose backends list what is said, and which has noticed that."""
    async with running_gateway(config, hosts=lists) as world:
        for name, names in lists.items():
            say(world, name, listing(*names))
        await trio.sleep(NOTICED + 20)  # also until they have started slowly
        yield world


async def ids(world: World) -> list[str]:
    return [card["id"] for card in (await world.get("/v1/models")).json()["data"]]


async def hosts(world: World, model: str, count: int) -> Counter[str]:
    return Counter([host(await world.ask(model)) for _ in range(count)])


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"data": [{"id": "a"}, {"id": "b:7b"}, {"id": "a"}]}', ("a", "b:7b")),
        (b'{"data": null}', ()),
        (b'{"data": []}', ()),
        (b'{"data": [{"id": ""}, {"id": "a b"}, {"id": 1}, 2, {"name": "c"}]}', ()),
        (b'{"data": [{"id": "' + b"x" * 129 + b'"}]}', ()),
    ],
)
def test_names_are_read_that_a_client_could_ask_for(body: bytes, names: tuple[str, ...]) -> None:
    assert read_model_names(body) == names


def test_no_more_are_read_than_anybody_has() -> None:
    cards = [{"id": str(n)} for n in range(MOST + 5)]

    assert len(read_model_names(orjson.dumps({"data": cards}))) == MOST


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"data": 1}', b'{"error": "no"}'])
def test_what_is_no_list_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_model_names(body)


# --- the configuration ---------------------------------------------------------------------------


def test_with_backends_no_model_need_be_configured() -> None:
    assert parse(backends("a")).models == {}


def test_without_backends_some_must_be() -> None:
    with pytest.raises(ConfigError, match="models: is required"):
        parse({})


def test_names_that_a_backend_may_list_may_be_used() -> None:
    config = backends("a", models={"m": {"fallbacks": ["n"]}}, gateway={"default_model": "n"})

    assert parse(config).default_model() == "n"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{"url": "http://a"}, {"url": "http://a"}], "backends[1].url: http://a is there twice"),
        ([{"url": "http://a", "resolve": "each"}], "a backend is one server, so it is 'together'"),
    ],
)
def test_what_is_wrong_with_a_backend_is_said(entries: list[Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"backends": entries})

    assert problem in str(caught.value)


# --- what becomes of it --------------------------------------------------------------------------


async def test_models_that_backends_list_are_served_from_the_start(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(backends("a"), hosts=["a"]) as world:
        (name,) = await ids(world)
        warmth = world.endpoint("a").warmth
        answer = await world.ask(name)

    assert warmth == 1.0
    assert (answer.status, host(answer)) == (200, "a")


async def test_a_request_goes_to_a_backend_that_lists_its_model(
    autojump_clock: MockClock,
) -> None:
    async with running(backends("a", "b"), a=("x", "y"), b=("y", "z")) as world:
        assert await ids(world) == ["x", "y", "z"]
        assert await hosts(world, "x", 2) == {"a": 2}
        assert await hosts(world, "y", 4) == {"a": 2, "b": 2}
        assert await hosts(world, "z", 2) == {"b": 2}
        assert (await world.ask("w")).status == 404
        status = (await world.get("/models/status")).json()["models"]["x"]

        assert status["sources"] == [
            {"source": "backend", "name": endpoint("a"), "endpoints": 1, "problems": []}
        ]


async def test_a_model_joins_and_leaves_and_the_others_keep_what_they_have(
    autojump_clock: MockClock,
) -> None:
    async with running(backends("a"), a=("x",)) as world:
        kept = world.endpoint("a")
        generation = world.service.generation.number
        say(world, "a", listing("x", "y"))
        await trio.sleep(NOTICED)
        both, joined = await ids(world), (await world.ask("y")).status
        say(world, "a", listing("x"))
        await trio.sleep(NOTICED)
        one, left = await ids(world), (await world.ask("y")).status

        assert (both, joined, one, left) == (["x", "y"], 200, ["x"], 404)
        assert [u.endpoint for u in world.service.balancer.upstreams] == [kept]
        assert world.service.generation.number == generation
        assert len(world.service.generations) == 1


async def test_a_request_for_a_model_that_is_no_longer_listed_finishes(
    autojump_clock: MockClock,
) -> None:
    async with running(backends("a"), a=("x", "y")) as world:
        world.engines["a"].default = engines.stream_chat(["a"] * 40, gap=1.0)
        seen: list[Any] = []

        async def drop() -> None:
            await trio.sleep(1)
            say(world, "a", listing("x"))
            await trio.sleep(NOTICED)
            seen.append(await ids(world))
            seen.append([u.endpoint.model for u in world.service.balancer.leaving])

        answer, _ = await gather(partial(world.ask, "y", stream=True), drop)

    assert seen == [["x"], ["y"]]
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_a_backend_joins_a_model_that_is_configured(autojump_clock: MockClock) -> None:
    config = backends("b", models={"m": {"endpoint": endpoint("a"), "max_concurrent": 3}})
    async with running(config, b=("m",)) as world:
        assert await hosts(world, "m", 4) == {"a": 2, "b": 2}
        assert world.endpoint("b").max_concurrent == 3
        say(world, "b", listing())
        await trio.sleep(NOTICED)
        assert await hosts(world, "m", 2) == {"a": 2}


async def test_a_name_for_the_engines_or_an_alias_is_no_model_of_its_own(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"endpoints": [], "upstream_model": "org/m", "aliases": ["gpt"]}}
    async with running(backends("a", models=models), a=("org/m", "gpt", "auto")) as world:
        listed, answer = await ids(world), await world.ask("gpt")
        asked = world.engines["a"].posts[0].json["model"]

    assert (listed, answer.status, asked) == (["m"], 200, "org/m")


@pytest.mark.parametrize(
    "bad", [engines.status(500), engines.html(), engines.hang()], ids=["500", "html", "silence"]
)
async def test_a_backend_that_does_not_say_what_it_has_keeps_what_it_had(
    bad: Any, autojump_clock: MockClock
) -> None:
    script = bad if isinstance(bad, Script) else Script([bad])
    async with running(backends("a"), a=("x",)) as world:
        say(world, "a", script)
        await trio.sleep(NOTICED)
        answer = await world.ask("x")
        (source,) = (await world.get("/models/status")).json()["models"]["x"]["sources"]
        lines = [line for line in world.log.lines if "does not list" in line["event"]]
        say(world, "a", listing("x"))
        await trio.sleep(NOTICED)
        (healed,) = (await world.get("/models/status")).json()["models"]["x"]["sources"]

    assert answer.status == 200
    assert source["problems"][0].startswith("no list of models")
    assert len(lines) == 1
    assert healed["problems"] == []


async def test_a_reload_keeps_what_is_listed_and_follows_other_backends(
    autojump_clock: MockClock,
) -> None:
    async with running(backends("a"), a=("x",), b=("y",)) as world:
        kept = world.endpoint("a")
        await world.service.adopt(parse(backends("a", "b"), source="test"))
        both = await ids(world)
        same = world.endpoint("a") is kept
        await world.service.adopt(parse(backends("b"), source="test"))
        await trio.sleep(1)
        one = await ids(world)

    assert (both, one, same) == (["x", "y"], ["y"], True)


async def test_counts_of_a_model_that_is_gone_are_forgotten(autojump_clock: MockClock) -> None:
    async with running(backends("a"), a=("x", "y")) as world:
        for name in ("x", "y"):
            await world.ask(name)
        say(world, "a", listing("x"))
        await trio.sleep(120)
        soon = await world.metrics_page()
        await trio.sleep(400)
        later = await world.metrics_page()

    assert 'model="y"' in soon
    assert 'model="y"' not in later
    assert 'model="x"' in later


async def test_a_worker_without_a_store_has_its_part_of_what_is_found_out(
    autojump_clock: MockClock,
) -> None:
    config = backends("a", store={"kind": "memory"})
    config["backends"][0]["max_concurrent"] = 8
    async with running(config, a=(), b=("x",)) as world:
        service = world.service
        service.discovery.portion = portion_of(service.config, 0, 4)
        say(world, "a", listing("x"))
        await trio.sleep(NOTICED)

        assert world.endpoint("a").max_concurrent == 2


def test_with_a_store_each_worker_may_have_all() -> None:
    config = parse(backends("a", store={"kind": "lmdb"}))
    (backend,) = config.backends

    assert portion_of(config, 0, 4)(backend) is backend
