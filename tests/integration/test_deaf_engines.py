"""Whole answers of engines that would not notice their client leave: streamed, and assembled."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock

from tests.support import scripted_engine as engines
from tests.support.canonical_engine import Canonical
from tests.support.gateway import CHAT, chat, endpoint, fleet, running_gateway
from tests.support.raw_client import http_request
from tests.support.scripted_engine import Answer, hang, status

ENGINE = Canonical(("The", " sea", "."), "llamacpp")
HEALTH = ("GET", "/health")


def llamacpp(*hosts: str) -> Any:
    return fleet({"m": {"endpoints": [{"url": endpoint(h)} for h in hosts], "engine": "llamacpp"}})


async def test_the_engine_is_asked_for_a_stream_and_the_client_gets_it_whole(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(llamacpp("m")) as world:
        world.engines["m"].default = ENGINE.answer("one")
        response = await world.ask("m", max_tokens=9, stream=False)
        [post] = world.posts
        await trio.sleep(0.1)
        [line] = world.access_log

    assert post.json == {
        **chat("m", max_tokens=9), "stream": True, "stream_options": {"include_usage": True}
    }  # fmt: skip
    answer = response.json()
    assert response.header("content-type") == "application/json"
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ENGINE.text}
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    assert (line["stream"], line["prompt_tokens"], line["completion_tokens"]) == (False, 11, 3)


async def test_a_client_that_leaves_is_noticed_between_two_words(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(llamacpp("m")) as world:
        world.engines["m"].default = ENGINE.breaks("one", 2, hang())
        async with world.client() as client:
            await client.send(http_request("POST", CHAT, chat("m")))
            await trio.sleep(1)
        await trio.sleep(0.1)
        assert world.engines["m"].abandoned == 1


async def test_a_stream_that_breaks_is_no_answer_and_somebody_else_is_asked(
    autojump_clock: MockClock,
) -> None:
    failures: list[Answer] = [
        ENGINE.breaks("one", 2),
        engines.error_event(2),
        engines.no_finish(2),
        engines.whole_chat("unasked"),
        status(500),
    ]
    async with running_gateway(llamacpp("a", "b")) as world:
        world.engines["a"].scripts.extend(failures)
        world.engines["b"].default = ENGINE.answer("b")
        for _ in range(2 * len(failures)):
            response = await world.ask("m")
            assert response.status == 200
            assert response.json()["choices"][0]["message"]["content"] == ENGINE.text


async def test_an_error_in_the_stream_is_an_error_with_a_status(autojump_clock: MockClock) -> None:
    async with running_gateway(llamacpp("m")) as world:
        world.engines["m"].default = engines.error_event(2, "out of memory")
        response = await world.ask("m")

    assert response.status == 500
    assert response.json()["error"]["message"] == "out of memory"


async def test_an_answer_too_large_to_keep_is_refused(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("citadel_gateway.io.upstream.MAX_ANSWER", 500)
    async with running_gateway(llamacpp("m")) as world:
        world.engines["m"].default = ENGINE.answer("one")
        response = await world.ask("m")

    assert response.status == 502
    assert "larger than 500 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(("server", "streams"), [("llama.cpp", True), ("uvicorn", False)])
async def test_an_engine_is_known_by_what_its_health_check_says(
    autojump_clock: MockClock, server: str, streams: bool
) -> None:
    balancer = {"health_check_interval": 1}
    async with running_gateway(fleet({"m": ["m"]}, load_balancer=balancer)) as world:
        world.engines["m"].routes[HEALTH] = status(200, b"{}", [("server", server)])
        await trio.sleep(2)
        world.engines["m"].default = ENGINE.answer("one") if streams else engines.as_asked
        response = await world.ask("m")

    assert response.status == 200
    assert orjson.loads(world.posts[0].body).get("stream", False) is streams


async def test_embeddings_do_not_come_in_pieces(autojump_clock: MockClock) -> None:
    async with running_gateway(llamacpp("m")) as world:
        world.engines["m"].default = status(200, b'{"data": [{"embedding": [1]}]}')
        body = {"model": "m", "input": "x"}
        response = await world.send("POST", "/v1/embeddings", body)

    assert response.status == 200
    assert world.posts[0].json == body
