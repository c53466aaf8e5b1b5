"""Endpoints that a file lists come and go with it, and a bad file changes nothing."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.config.endpoint_list import load_endpoints
from citadel_gateway.config.loader import ConfigError, parse
from citadel_gateway.config.schema import ModelConfig
from citadel_gateway.config.values import Count
from citadel_gateway.io.endpoint_files import EndpointFiles
from tests.support import scripted_engine as engines
from tests.support.gateway import World, endpoint, fleet, gather, running_gateway
from tests.support.ledger import Metrics
from tests.support.raw_client import RawResponse

NOTICED = 1.6  # seconds: two looks, and the probe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "endpoints.json"


def listing(path: Path, *hosts: str, **options: Any) -> None:
    """Another file takes the place of the one that there is."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(orjson.dumps([{"url": endpoint(host), **options} for host in hosts]))
    fresh.replace(path)


def write(path: Path, text: str) -> None:
    path.write_text(text)


def remove(path: Path) -> None:
    path.unlink()


def from_file(path: Path, **options: Any) -> Any:
    return fleet({"m": {"endpoints": [], "endpoints_file": str(path), **options}})


def host(answer: RawResponse) -> str:
    backend = answer.header("x-citadel-backend") or ""
    return backend.removeprefix("http://").removesuffix(":8000")


async def hosts(world: World, count: int) -> Counter[str]:
    return Counter([host(await world.ask("m")) for _ in range(count)])


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return next(
        number
        for (family, pairs), number in metrics.items()
        if family == f"citadel_gateway_{name}" and labels.items() <= dict(pairs).items()
    )


async def status(world: World) -> dict[str, Any]:
    report: dict[str, Any] = (await world.get("/models/status")).json()["models"]["m"]
    return report


# --- what is in a file ---------------------------------------------------------------------------


def load(text: str, model: ModelConfig | None = None) -> list[str]:
    model = model or ModelConfig()
    found = load_endpoints(text, source="f", model=model, environ={"KEY": "sesame"})
    return [f"{e.url} {e.weight} {e.api_key}" for e in found]


@pytest.mark.parametrize(
    "text",
    [
        '[{"url": "http://a", "weight": 2, "api_key": "env:KEY"}, {"url": "http://b"}]',
        "- url: http://a\n  weight: 2\n  api_key: env:KEY\n- url: http://b/\n",
    ],
    ids=["json", "yaml"],
)
def test_a_list_is_written_as_in_the_configuration(text: str) -> None:
    assert load(text) == ["http://a 2.0 sesame", "http://b None None"]


def test_an_empty_list_is_a_list() -> None:
    assert load("[]") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty; a list without endpoints is []"),
        ("{}", "a mapping where a list should be"),
        ("- {url: abc}", "[0].url: 'abc' does not begin with http://, https:// or unix:/ (line 1)"),
        ("- {weight: 1}", "[0].url: is required (line 1)"),
        ("- {url: 'http://a'}\n- {url: 'http://a'}", "[1].url: http://a is there twice (line 2)"),
        (
            "- {url: 'http://a', max_concurrent: 2}",
            "[0].min_concurrent: 3 is more than max_concurrent, 2 (line 1)",
        ),
        (
            "- {url: 'http://10.0.0.1', resolve: each}",
            "[0].resolve: 'each' needs a URL with a name in it (line 1)",
        ),
        (
            "- {url: 'http://a', wieght: 1}",
            "[0].wieght: unknown option; did you mean 'weight'? (line 1)",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, ModelConfig(min_concurrent=Count(3)))

    assert caught.value.problems == [problem]


def test_a_model_with_a_file_needs_no_other_endpoints(path: Path) -> None:
    config = parse(from_file(path, resolve="each", tls={"server_name": "gpu"}))

    assert [model.all_endpoints() for model in config.models.values()] == [()]


# --- what becomes of it --------------------------------------------------------------------------


async def test_endpoints_of_a_file_serve_from_the_start(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a", "b")
    async with running_gateway(from_file(path), hosts=["a", "b"]) as world:
        assert await hosts(world, 4) == {"a": 2, "b": 2}
        assert [e["slow_start_share"] for e in (await status(world))["endpoints"]] == [1.0, 1.0]


async def test_a_changed_file_counts_within_two_seconds_and_keeps_what_it_has_not_changed(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a", "b")
    async with running_gateway(from_file(path), hosts=["a", "b", "c"]) as world:
        kept = world.endpoint("b")
        kept.latency.observe(5.0, trio.current_time())
        listing(path, "b", "c")
        await trio.sleep(NOTICED)
        warmth = world.endpoint("c").warmth
        await trio.sleep(60)
        answers = await hosts(world, 8)
        metrics = await world.metrics()

        assert world.endpoint("b") is kept
        assert warmth < 1.0
        assert answers == {"b": 4, "c": 4}
        assert value(metrics, "endpoint_changes_total", model="m", change="added") == 1
        assert value(metrics, "endpoint_changes_total", model="m", change="removed") == 1
        assert world.engines["a"].posts == []


async def test_a_file_that_is_written_in_place_is_noticed_too(
    autojump_clock: MockClock, path: Path
) -> None:
    write(path, "[{url: 'http://a:8000'}]")
    async with running_gateway(from_file(path), hosts=["a", "b"]) as world:
        write(path, "- {url: 'http://b:8000', weight: 1}")
        await trio.sleep(NOTICED)
        assert await hosts(world, 2) == {"b": 2}


async def test_a_file_is_not_read_while_it_is_half_written(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a")
    async with running_gateway(from_file(path), hosts=["a", "b"]) as world:
        for text in ("[", "[{url: ", "[{url: 'http://b", "[{url: 'http://b:8000'}]"):
            write(path, text)
            await trio.sleep(0.5)
        await trio.sleep(NOTICED)
        troubles = [line for line in world.log.lines if "list of endpoints" in line["event"]]
        answers = await hosts(world, 2)

    assert (troubles, answers) == ([], {"b": 2})


async def test_requests_with_an_endpoint_that_is_dropped_finish(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a")
    async with running_gateway(from_file(path), hosts=["a", "b"]) as world:
        world.engines["a"].default = engines.stream_chat(["a"] * 20, gap=1.0)
        dropped = world.endpoint("a")
        during: list[Any] = []

        async def drop() -> None:
            await trio.sleep(0.5)
            listing(path, "b")
            await trio.sleep(3)
            during.extend(u.endpoint for u in world.service.balancer.leaving)
            during.append(await hosts(world, 2))

        answer, _ = await gather(partial(world.ask, "m", stream=True), drop)
        await wait_all_tasks_blocked()

        assert during == [dropped, {"b": 2}]
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert world.service.balancer.leaving == []


@pytest.mark.parametrize("bad", ["[{", "", "- {url: 'http://c:8000', weight: -1}", None])
async def test_a_bad_file_leaves_the_last_good_list_in_use_and_says_why(
    bad: str | None, autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a")
    async with running_gateway(from_file(path), hosts=["a", "b", "c"]) as world:
        if bad is None:
            remove(path)
        else:
            write(path, bad)
        await trio.sleep(10)
        while_bad = await hosts(world, 2)
        (source,) = (await status(world))["sources"]
        failing = value(await world.metrics(), "source_failing", model="m", source="file")
        lines = [line for line in world.log.lines if "list of endpoints" in line["event"]]
        listing(path, "b")
        await trio.sleep(NOTICED)
        healed = await hosts(world, 2)
        (again,) = (await status(world))["sources"]

    assert (while_bad, healed) == ({"a": 2}, {"b": 2})
    assert (source["source"], source["name"], source["endpoints"]) == ("file", str(path), 1)
    assert len(source["problems"]) == 1
    assert (len(lines), lines[0]["problem"], failing) == (1, source["problems"][0], 1)
    assert again == {"source": "file", "name": str(path), "endpoints": 1, "problems": []}


async def test_a_file_may_come_after_the_gateway(autojump_clock: MockClock, path: Path) -> None:
    async with running_gateway(from_file(path), hosts=["a"]) as world:
        before = (await world.ask("m")).status
        listing(path, "a")
        await trio.sleep(NOTICED)
        after = (await world.ask("m")).status

    assert (before, after) == (503, 200)


async def test_another_weight_counts_at_once_and_costs_the_endpoint_nothing_else(
    autojump_clock: MockClock, path: Path
) -> None:
    config = from_file(path)
    config["load_balancer"] = {"algorithm": "weighted_round_robin"}
    write(path, "[{url: 'http://a:8000'}, {url: 'http://b:8000'}]")
    async with running_gateway(config, hosts=["a", "b"]) as world:
        before, equal = world.endpoint("a"), await hosts(world, 8)
        write(path, "[{url: 'http://a:8000', weight: 3}, {url: 'http://b:8000'}]")
        await trio.sleep(NOTICED)
        await hosts(world, 4)
        after = await hosts(world, 8)

        assert world.endpoint("a") is before
        assert before.warmth == 1.0
        assert (equal, after) == ({"a": 4, "b": 4}, {"a": 6, "b": 2})


async def test_another_key_is_shown_to_the_engine_and_to_its_probe(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a", api_key="old")
    async with running_gateway(from_file(path), hosts=["a"]) as world:
        await world.ask("m")
        listing(path, "a", api_key="new")
        await trio.sleep(NOTICED)
        probes = [
            e.headers["authorization"] for e in world.engines["a"].ledger if e.method == "GET"
        ]
        await world.ask("m")
        keys = [entry.headers["authorization"] for entry in world.engines["a"].posts]
        (checker,) = world.service.watch.checkers

        assert keys == ["Bearer old", "Bearer new"]
        assert probes[-1] == "Bearer new"  # at once, not at the next interval
        assert checker.probe.headers == {"authorization": "Bearer new"}


async def test_an_endpoint_that_the_configuration_lists_too_stays_when_the_file_drops_it(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a", "b")
    config = fleet({"m": {"endpoint": endpoint("a"), "endpoints_file": str(path)}})
    async with running_gateway(config, hosts=["b"]) as world:
        both = await hosts(world, 4)
        write(path, "[]")
        await trio.sleep(NOTICED)
        assert (both, await hosts(world, 2)) == ({"a": 2, "b": 2}, {"a": 2})


async def test_names_in_a_file_may_stand_for_several_too(
    autojump_clock: MockClock, path: Path
) -> None:
    names = {"pool": ["10.0.0.1", "10.0.0.2"]}
    listing(path, "a")
    async with running_gateway(
        from_file(path), addresses=names, hosts=["a", *names["pool"]]
    ) as world:
        listing(path, "pool", resolve="each")
        await trio.sleep(NOTICED + 1)
        answers = await hosts(world, 4)

    assert answers == {"pool:8000 [10.0.0.1]": 2, "pool:8000 [10.0.0.2]": 2}


async def test_a_reload_keeps_what_a_file_lists(autojump_clock: MockClock, path: Path) -> None:
    listing(path, "a", "b")
    config = from_file(path)
    async with running_gateway(config, hosts=["a", "b"]) as world:
        before = [u.endpoint for u in world.service.balancer.upstreams]
        await world.service.adopt(parse(config, source="test"))
        await trio.sleep(5)
        after = [u.endpoint for u in world.service.balancer.upstreams]
        listing(path, "b")
        await trio.sleep(NOTICED)
        answers = await hosts(world, 2)

    assert before == after
    assert answers == {"b": 2}


async def test_a_list_that_another_configuration_of_the_model_rules_out_is_bad_from_then_on(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a", min_concurrent=6)
    async with running_gateway(from_file(path), hosts=["a"]) as world:
        await world.service.adopt(parse(from_file(path, max_concurrent=4), source="test"))
        (source,) = (await status(world))["sources"]
        answer = (await world.ask("m")).status

    assert source["problems"] == ["[0].min_concurrent: 6 is more than max_concurrent, 4 (line 1)"]
    assert answer == 200


async def test_endpoints_move_from_the_configuration_into_a_file_and_no_request_notices(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a")
    async with running_gateway(fleet({"m": ["a"]})) as world:
        before = world.endpoint("a")
        await world.service.adopt(parse(from_file(path), source="test"))
        answer = await world.ask("m")

        assert world.endpoint("a") is before
        assert answer.status == 200
        assert not [line for line in world.log.lines if line["event"] == "health"][1:]


async def test_a_file_that_no_configuration_names_any_more_is_not_looked_at(
    autojump_clock: MockClock, path: Path
) -> None:
    listing(path, "a")
    async with running_gateway(from_file(path), hosts=["a"]) as world:
        await world.service.adopt(parse(fleet({"m": ["a"]}), source="test"))
        await trio.sleep(1)

        assert world.service.discovery.files.known("m", str(path)) == ()


async def test_files_are_read_in_threads(path: Path) -> None:
    listing(path, "a")
    files, model, changes = EndpointFiles(), ModelConfig(), trio.Event()
    files.on_change = lambda _: changes.set()
    await files.look("m", str(path), model)
    first, changes = files.known("m", str(path)), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.run)
        listing(path, "a", "b")
        with trio.fail_after(10):
            await changes.wait()
        nursery.cancel_scope.cancel()

    assert [len(first), len(files.known("m", str(path)))] == [1, 2]
