"""Streams that outlive their engine: what the client gets, and what the second engine is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import orjson
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.config.loader import parse
from citadel_gateway.policy.circuit_breaker import State
from tests.support import scripted_engine as engines
from tests.support.canonical_engine import SHAPES, Canonical, stream
from tests.support.gateway import (
    CHAT,
    PORT,
    World,
    chat,
    endpoint,
    events,
    fleet,
    gather,
    running_gateway,
)
from tests.support.ledger import total
from tests.support.raw_client import RawResponse, http_request
from tests.support.scripted_engine import LedgerEntry, Script, Step, close, hang, reset, sleep

TOKENS = ("The", " sea", "\n", "\n", " was", " «calm»", " 海", ' "so"', ".", " And", " then", "\n")
IDLE = 3
OTHER_LIMITS = {"retry_budget_floor": 100, "circuit_breaker_threshold": 1000}
ENDINGS: dict[str, tuple[Step, ...]] = {"FIN": (close(),), "stall": (hang(),)}


def gateway_for(*hosts: str, engine: str = "vllm", **sections: Any) -> dict[str, Any]:
    balancer = {**OTHER_LIMITS, **sections.pop("load_balancer", {})}
    timeouts = {"idle": IDLE, "first_token": 5}
    performance = {"timeouts": timeouts, **sections.pop("performance", {})}
    model = {"endpoints": [{"url": endpoint(host)} for host in hosts], "engine": engine}
    made: dict[str, Any] = fleet(
        {"m": model}, load_balancer=balancer, performance=performance, **sections
    )
    return made


async def ask(world: World, engine: Canonical, **fields: Any) -> RawResponse:
    if engine.shape != "completions":
        return await world.ask("m", stream=True, **fields)
    return await world.send(
        "POST", "/v1/completions", {"model": "m", "prompt": "Once", "stream": True, **fields}
    )


def text(response: RawResponse) -> str:
    said = ""
    for event in events(response):
        for choice in event.get("choices", []) if isinstance(event, dict) else []:
            said += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return said


def assert_whole(response: RawResponse, engine: Canonical) -> None:
    """As if no engine had ever failed."""
    assert (response.status, response.complete) == (200, True)
    *said, done = events(response)
    assert done == "[DONE]"
    assert text(response) == engine.text
    assert len({event["id"] for event in said}) == 1
    reasons = [choice["finish_reason"] for event in said for choice in event["choices"]]
    assert [reason for reason in reasons if reason] == ["stop"]


def assert_broken(response: RawResponse, code: str) -> None:
    assert response.status == 200
    assert not response.complete
    assert events(response)[-1]["error"]["code"] == code
    assert b"[DONE]" not in response.body


def breaking(world: World, script: Callable[[LedgerEntry], Script] | Script) -> None:
    """The engine that is asked first fails by *script*."""
    world.engines["a"].default = script


# --- whatever breaks, wherever it breaks -----------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_stream_that_is_cut_anywhere_comes_out_whole(
    autojump_clock: MockClock, shape: str, ending: str
) -> None:
    engine = Canonical(TOKENS, shape)
    async with running_gateway(gateway_for("a", "b")) as world:
        world.engines["b"].default = engine.answer("two")
        for after in range(1, len(engine.chunks("one"))):
            breaking(world, engine.breaks("one", after, *ENDINGS[ending]))
            while True:  # until it is the turn of the one that breaks
                response = await ask(world, engine)
                assert_whole(response, engine)
                if len(world.engines["a"].posts) == after:
                    break


@pytest.mark.parametrize("shape", ["vllm", "completions"])
async def test_a_replayed_stream_comes_out_whole(autojump_clock: MockClock, shape: str) -> None:
    engine = Canonical(TOKENS, shape)
    async with running_gateway(gateway_for("a", "b")) as world:
        world.engines["b"].default = engine.refuses("two")
        for after in range(1, len(engine.chunks("one"))):
            breaking(world, engine.breaks("one", after))
            while True:
                response = await ask(world, engine, temperature=0)
                assert_whole(response, engine)
                if len(world.engines["a"].posts) == after:
                    break


async def first_to_a(world: World, engine: Canonical, **fields: Any) -> RawResponse:
    """The answer to a request whose first endpoint is the one on host a."""
    while not world.engines["a"].posts:
        response = await ask(world, engine, **fields)
    return response


FAILURES: dict[str, list[Step]] = {
    "error event": [engines.send(b'1e\r\ndata: {"error":{"message":"x"}}\n\n\r\n'), hang()],
    "nonsense": [*[engines.send(b"9\r\ndata: ?\n\n\r\n")] * 6, hang()],
    "no HTTP": [engines.send(b"zz\r\n"), hang()],
    "half an event": [engines.send(b'40\r\ndata: {"id"'), close()],
    "RST": [sleep(0.1), reset()],
    "a clean end": [engines.send(b"0\r\n\r\n")],
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_whatever_breaks_a_stream_another_endpoint_goes_on(
    autojump_clock: MockClock, failure: str
) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 4, *FAILURES[failure]))
        world.engines["b"].default = engine.answer("two")
        response = await first_to_a(world, engine)
        await trio.sleep(0.1)

    assert_whole(response, engine)
    assert world.access_log[-1]["outcome"] == "ok"
    assert world.access_log[-1]["attempts"] == 2


async def test_the_one_who_goes_on_may_break_as_well(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b", "c")) as world:
        breaking(world, engine.breaks("one", 4))
        world.engines["b"].default = engine.breaks("two", 4)
        world.engines["c"].scripts.extend([engine.answer("three")] * 3)
        response = await first_to_a(world, engine)
        posts = world.posts[-3:]

    assert_whole(response, engine)
    assert len({len(entry.body) for entry in posts}) == 3  # each was given more than the last


async def test_two_clients_events_do_not_mix(autojump_clock: MockClock) -> None:
    one, two = Canonical(TOKENS), Canonical(tuple(token.upper() for token in TOKENS))

    def answer(entry: LedgerEntry) -> Script:
        engine = one if entry.json["messages"][0]["content"] == "hi" else two
        return engine.answer("b")(entry)

    def cut(entry: LedgerEntry) -> Script:
        engine = one if entry.json["messages"][0]["content"] == "hi" else two
        return engine.breaks("a", 5, sleep(1), close())(entry)

    async def ask(content: str) -> RawResponse:
        return await world.ask("m", messages=[{"role": "user", "content": content}], stream=True)

    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, cut)
        world.engines["b"].default = answer
        calls = [lambda content=c: ask(content) for c in ("hi", "HI") * 5]
        responses = await gather(*calls)

    for response, engine in zip(responses, (one, two) * 5, strict=True):
        assert_whole(response, engine)


# --- what is asked, of whom ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "added"),
    [
        ("vllm", {"continue_final_message": True, "add_generation_prompt": False}),
        ("sglang", {"continue_final_message": True, "add_generation_prompt": False}),
        ("llamacpp", {"continue_final_message": True, "add_generation_prompt": False}),
        ("ollama", {}),
    ],
)
async def test_each_engine_is_given_the_beginning_in_its_own_way(
    autojump_clock: MockClock, engine: str, added: dict[str, Any]
) -> None:
    canonical = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b", engine=engine)) as world:
        breaking(world, canonical.breaks("one", 4))
        world.engines["b"].scripts.append(canonical.answer("two"))
        await first_to_a(world, canonical, max_tokens=100)
        body = world.engines["b"].posts[-1].json

    last = {"role": "assistant", "content": "The sea"}
    assert body == {
        **chat("m", stream=True, max_tokens=97), **added,
        "messages": [*chat()["messages"], last], "stream_options": {"include_usage": True},
    }  # fmt: skip


@pytest.mark.parametrize(("temperature", "whole"), [(0, True), (0.7, False)])
async def test_an_engine_that_knows_no_beginnings_replays_or_is_not_asked(
    autojump_clock: MockClock, temperature: float, whole: bool
) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b", engine="openai")) as world:
        breaking(world, engine.breaks("one", 5))
        response = await first_to_a(world, engine, temperature=temperature)
        before = len(world.engines["b"].posts)
        world.engines["a"].ledger.clear()
        world.engines["b"].default = engine.answer("two")
        response = await first_to_a(world, engine, temperature=temperature)
        asked = world.engines["b"].posts[before:]
        metrics = await world.metrics()

    if whole:
        assert_whole(response, engine)
        assert asked[-1].json["messages"] == chat()["messages"]
    else:
        assert_broken(response, "upstream_connection_error")
        assert total(metrics, "citadel_gateway_continuations_total", way="none") == 2


async def test_a_refused_beginning_is_not_blamed_on_the_engine_nor_told_to_the_client(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 5))
        world.engines["b"].default = engine.refuses("two")
        response = await first_to_a(world, engine)
        breaker = world.endpoint("b").breaker
        assert breaker.state(trio.current_time()) is State.CLOSED

    assert_broken(response, "upstream_connection_error")


async def test_who_has_refused_the_request_as_it_is_is_not_sent_it_once_more(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(("\n\n", *TOKENS))
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 2))  # behind white space, so that b begins anew
        world.engines["b"].default = engines.status(400, b'{"error": {"message": "too long"}}')
        response = await first_to_a(world, engine, temperature=0)
        asked = world.engines["b"].posts[-1].json

    assert_broken(response, "upstream_connection_error")
    assert asked["messages"] == chat()["messages"]
    assert world.access_log[-1]["attempts"] == 2


async def test_a_replay_that_ends_too_early_is_no_end_whatever_it_counts(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    usage = {"prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12}
    shorter = [{**chunk, "usage": usage} for chunk in Canonical(TOKENS[:1]).chunks("two")]
    async with running_gateway(gateway_for("a", "b", engine="openai")) as world:
        breaking(world, engine.breaks("one", 5))
        world.engines["b"].default = stream(shorter, end=b"data: [DONE]\n\n")
        response = await first_to_a(world, engine, temperature=0)

    assert_broken(response, "upstream_connection_error")


async def test_a_replay_that_differs_ends_with_the_error_of_the_break(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b", engine="openai")) as world:
        breaking(world, engine.breaks("one", 5))
        world.engines["b"].default = Canonical(("The", " sky")).answer("two")
        response = await first_to_a(world, engine, temperature=0)

    assert_broken(response, "upstream_connection_error")
    assert text(response) == "The sea\n\n"[:9]


async def test_the_last_event_may_be_all_that_is_missing(autojump_clock: MockClock) -> None:
    engine = Canonical(("a", "b", "c", "d", "e"))
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 4))
        world.engines["b"].default = engine.answer("two")
        asked = {"max_tokens": 3, "stream_options": {"include_usage": True}}
        response = await first_to_a(world, engine, **asked)

    *_, end, usage, done = events(response)
    assert text(response) == "abc"
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    assert done == "[DONE]"


@pytest.mark.parametrize("way", ["resume", "replay"])
async def test_usage_is_that_of_one_request(autojump_clock: MockClock, way: str) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 7))
        world.engines["b"].default = engine.answer("two")
        if way == "replay":
            world.engines["b"].default = engine.refuses("two")
        asked = {"temperature": 0, "stream_options": {"include_usage": True}}
        response = await first_to_a(world, engine, **asked)
        metrics = await world.metrics()
        line = world.access_log[-1]

    prompt, completion = 11, len(TOKENS)
    assert events(response)[-2]["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }  # fmt: skip
    assert (line["prompt_tokens"], line["completion_tokens"]) == (prompt, completion)
    assert total(metrics, "citadel_gateway_continuations_total", way=way) == 1


# --- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "fields"),
    [
        ({"streaming": {"continue_broken": False}}, {}),
        ({"streaming": {"continue_max_bytes": 8}}, {}),
        ({"load_balancer": {"max_attempts": 1}}, {}),
        ({}, {"n": 2}),
        ({}, {"logprobs": True}),
        ({}, {"store": True}),
        ({}, {"response_format": {"type": "json_object"}}),
    ],
    ids=str,
)
async def test_where_it_may_not_be_continued_there_is_one_error(
    autojump_clock: MockClock, sections: dict[str, Any], fields: dict[str, Any]
) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b", **sections)) as world:
        breaking(world, engine.breaks("one", 8))
        world.engines["b"].default = engine.answer("two")
        response = await first_to_a(world, engine, **fields)
        metrics = await world.metrics()

    assert_broken(response, "upstream_connection_error")
    attempts = total(metrics, "citadel_gateway_attempts_total")
    assert attempts == total(metrics, "citadel_gateway_requests_total")


async def test_continuations_are_paid_from_the_budget_of_retries(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    one = {"retry_budget_floor": 0.1, "retry_budget_ratio": 0}  # in ten seconds
    async with running_gateway(gateway_for("a", "b", load_balancer=one)) as world:
        breaking(world, engine.breaks("one", 8))
        world.engines["b"].default = engine.answer("two")
        assert_whole(await first_to_a(world, engine), engine)
        world.engines["a"].ledger.clear()
        assert_broken(await first_to_a(world, engine), "upstream_connection_error")


async def test_a_tool_call_under_way_is_not_continued(autojump_clock: MockClock) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}
    chunk = {"id": "1", "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
    data = b"data: " + orjson.dumps(chunk) + b"\n\n"
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("1", 2, engines.send(b"%x\r\n%b\r\n" % (len(data), data)),
                                      close()))  # fmt: skip
        response = await first_to_a(world, engine, tools=[{}], temperature=0)

    assert_broken(response, "upstream_connection_error")


async def test_another_model_does_not_go_on(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS)
    models = {"m": {"endpoint": endpoint("a"), "fallbacks": ["n"]}, "n": ["b"]}
    async with running_gateway(fleet(models)) as world:
        breaking(world, engine.breaks("one", 4))
        for model in ("m", "auto"):
            world.engines["a"].ledger.clear()
            while not world.engines["a"].posts:
                response = await world.ask(model, stream=True)
            assert_broken(response, "upstream_connection_error")


async def test_the_endpoint_that_failed_is_not_asked_again(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 4))
        world.engines["b"].default = engines.status(503)
        response = await first_to_a(world, engine)
        assert len(world.engines["a"].posts) == 1

    assert_broken(response, "upstream_connection_error")


async def test_a_broken_stream_waits_for_a_slot_in_front_of_newer_requests(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    let_go, order = trio.Event(), []

    def note(entry: LedgerEntry) -> Script:
        order.append("new" if len(entry.json["messages"]) == 1 else "broken")
        return engine.answer("b")(entry)

    models = {"m": {"endpoints": [{"url": endpoint("a")}, {"url": endpoint("b")}],
                    "max_concurrent": 1, "engine": "vllm"}}  # fmt: skip
    async with running_gateway(fleet(models)) as world, trio.open_nursery() as nursery:
        busy = Script([engines.wait(let_go), *engines.stream_chat(["x"]).steps])
        world.engines["a"].scripts.append(engine.breaks("one", 4, sleep(2), close()))
        world.engines["a"].default = Script([hang()])
        world.engines["b"].scripts.append(busy)
        world.engines["b"].default = note
        results: list[RawResponse] = []

        async def send(delay: float) -> None:
            await trio.sleep(delay)
            results.append(await world.ask("m", stream=True))

        for delay in (0, 0.1, 1):  # on a, on b, and waiting for either
            nursery.start_soon(send, delay)
        await trio.sleep(1.5)
        world.net.refuse("a", PORT)
        await trio.sleep(1.5)
        let_go.set()

    assert order[0] == "broken"
    assert_whole(next(r for r in results if text(r) == engine.text), engine)


async def test_an_endpoint_that_comes_meanwhile_and_cannot_go_on_is_no_obstacle(
    autojump_clock: MockClock,
) -> None:
    """By another configuration, while the stream waits for a slot of one that can."""
    engine, busy = Canonical(TOKENS), Script([sleep(9), *engines.whole_chat("x").steps])

    def config(*others: dict[str, Any]) -> dict[str, Any]:
        known = [{"url": endpoint(h), "engine": "vllm", "max_concurrent": 1} for h in "ab"]
        model = {"endpoints": [*known, *others]}
        return dict(fleet({"m": model}, load_balancer=OTHER_LIMITS))

    async with running_gateway(config(), hosts=["c"]) as world, trio.open_nursery() as nursery:
        world.engines["a"].default = engine.breaks("one", 4, sleep(2), close())
        world.engines["b"].default = lambda e: engine.answer("two")(e) if engine.given(e) else busy
        answers: list[RawResponse] = []

        async def stream() -> None:
            answers.append(await ask(world, engine))

        nursery.start_soon(stream)
        await trio.sleep(0.1)
        nursery.start_soon(world.ask, "m")
        await trio.sleep(3)
        stranger = {"url": endpoint("c"), "engine": "openai"}
        await world.service.adopt(parse(config(stranger), source="test"))

    assert_whole(_without_comments(answers[0]), engine)
    assert world.engines["c"].posts == []


CARDS: dict[str, dict[str, Any]] = {
    "vllm": {"root": "/m", "parent": None, "max_model_len": 4096, "permission": []},
    "sglang": {"root": "/m", "parent": None, "max_model_len": 4096},
}


@pytest.mark.parametrize("engine", CARDS)
async def test_an_engine_that_shows_what_it_is_need_not_be_named(
    autojump_clock: MockClock, engine: str
) -> None:
    speech = Canonical(TOKENS, engine)
    card = {"id": "m", "object": "model", "created": 1, "owned_by": engine, **CARDS[engine]}
    listing = orjson.dumps({"object": "list", "data": [card]})
    async with running_gateway(gateway_for("a", "b", engine="auto")) as world:
        unknown = await _broken_on_a(world, speech)
        for each in world.engines.values():
            each.routes["GET", "/v1/models"] = engines.status(200, listing)
        for host in "ab":
            await _restart(world, host)
        report = (await world.get("/models/status")).json()["models"]["m"]["endpoints"]
        known = await _broken_on_a(world, speech)

    assert_broken(unknown, "upstream_connection_error")
    assert [each["engine"] for each in report] == [engine, engine]
    assert_whole(known, speech)


async def _broken_on_a(world: World, speech: Canonical) -> RawResponse:
    world.engines["a"].scripts.append(speech.breaks("one", 4))
    world.engines["b"].default = speech.answer("two")
    while world.engines["a"].scripts:
        response = await ask(world, speech)
    return response


async def _restart(world: World, host: str) -> None:
    """Long enough for probes to see that it is away, and that it is back."""
    world.net.refuse(host, PORT)
    await trio.sleep(60)
    assert not world.endpoint(host).health.healthy
    world.net.listen(host, PORT, world.engines[host].serve)
    await trio.sleep(10)
    assert world.endpoint(host).health.healthy


async def test_a_stream_may_be_continued_long_after_its_first_deadline(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    sections: Any = {"performance": {"request_timeout_seconds": 5, "timeouts": {"idle": 60}}}
    async with running_gateway(gateway_for("a", "b", **sections)) as world:
        breaking(world, engine.breaks("one", 4, sleep(50), close()))
        world.engines["b"].default = engine.answer("two")
        response = await first_to_a(world, engine)

    assert_whole(response, engine)


@pytest.mark.parametrize(
    ("timeouts", "took"),
    [({"first_token": 4}, 1 + 4), ({}, 1 + 5), ({"total": 3}, 3)],
    ids=["first token", "request", "total"],
)
async def test_the_one_who_goes_on_has_its_clocks(
    autojump_clock: MockClock, timeouts: dict[str, float], took: float
) -> None:
    engine = Canonical(TOKENS)
    sections: Any = {"performance": {"request_timeout_seconds": 5, "timeouts": timeouts}}
    async with running_gateway(gateway_for("a", "b", **sections)) as world:
        breaking(world, engine.breaks("one", 4, sleep(1), close()))
        world.engines["b"].default = lambda e: (
            engines.stall_after(0) if engine.given(e) else engine.answer("b")(e)
        )
        while not world.engines["a"].posts:
            began = trio.current_time()
            response = await ask(world, engine)

    assert_broken(response, "upstream_connection_error")
    assert trio.current_time() - began == pytest.approx(took, abs=0.11)


async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b")) as world:
        breaking(world, engine.breaks("one", 4))
        world.engines["b"].default = lambda e: (
            Script([hang()]) if engine.given(e) else engine.answer("b")(e)
        )
        while not world.engines["a"].posts:
            async with world.client() as client:
                await client.send(http_request("POST", CHAT, chat("m", stream=True)))
                with trio.move_on_after(2):
                    await client.read_response("POST")
        await trio.sleep(0.1)
        assert world.engines["b"].abandoned == 1
        assert world.access_log[-1]["outcome"] == "client_closed"


# --- comments --------------------------------------------------------------------------------


def comments(response: RawResponse) -> int:
    return response.body.count(b": keep-alive\n\n")


PATIENT: Any = {"performance": {"timeouts": {}}}


async def test_a_client_is_told_that_its_stream_will_go_on(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", "b", **PATIENT)) as world:
        breaking(world, engine.breaks("one", 4))
        world.engines["b"].default = lambda e: Script([sleep(25), *engine.answer("b")(e).steps])
        response = await first_to_a(world, engine)

    assert comments(response) == 2
    assert_whole(_without_comments(response), engine)


async def test_comments_before_the_first_token_are_sent_where_they_are_wanted(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS)
    early: Any = {**PATIENT, "streaming": {"keep_alive_before_first_token": 2}}
    async with running_gateway(gateway_for("a", **early)) as world:
        world.engines["a"].default = lambda e: Script([sleep(7), *engine.answer("a")(e).steps])
        response = await world.ask("m", stream=True)
        await trio.sleep(0.1)
        line = world.access_log[-1]

        world.engines["a"].default = engines.status(500)
        at_once = await world.ask("m", stream=True)
        whole = await world.ask("m")
        world.engines["a"].default = Script([sleep(3), *engines.status(500).steps])
        late = await world.ask("m", stream=True)

    assert comments(response) == 3
    assert_whole(_without_comments(response), engine)
    assert line["first_byte_ms"] == 7000  # of the answer
    assert (at_once.status, whole.status) == (500, 500)
    assert comments(late) == 1
    assert_broken(_without_comments(late), "upstream_500")


async def test_nobody_gets_comments_unasked(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS)
    async with running_gateway(gateway_for("a", **PATIENT)) as world:
        world.engines["a"].default = lambda e: Script([sleep(29), *engine.answer("a")(e).steps])
        response = await world.ask("m", stream=True)

    assert_whole(response, engine)


async def test_a_queue_that_is_full_is_told_in_the_stream_once_it_has_begun(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"endpoint": endpoint("a"), "max_concurrent": 1}}
    config = fleet(
        models, streaming={"keep_alive_before_first_token": 1}, load_balancer={"queue_timeout": 3}
    )
    async with running_gateway(config) as world, trio.open_nursery() as nursery:
        world.engines["a"].default = Script([sleep(5), *engines.stream_chat(["x"]).steps])
        nursery.start_soon(world.ask, "m")
        await trio.sleep(0.1)
        response = await world.ask("m", stream=True)

    assert comments(response) == 2
    assert_broken(_without_comments(response), "queue_timeout")


def _without_comments(response: RawResponse) -> RawResponse:
    return attrs.evolve(response, body=response.body.replace(b": keep-alive\n\n", b""))
