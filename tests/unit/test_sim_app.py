from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.sim import EngineProfile, create_engine_app
from citadel_gateway.sim.app import SimulatedEngine
from tests.support.sim_driver import Reply, calling, fetch, get

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
# Binary fractions, so that virtual time is exact: 128 prompt tokens take 1 s, a token 1/4 s.
PROFILE = EngineProfile(
    model="org/m", prefill_rate=128, decode_rate=4, crowding=0.5, context_window=400
)


def engine(**changes: Any) -> SimulatedEngine:
    return create_engine_app(attrs.evolve(PROFILE, **changes))


def ask(text: str = "Why is the sky blue?", **more: Any) -> dict[str, Any]:
    return {"model": "org/m", "messages": [{"role": "user", "content": text}], **more}


def deltas(reply: Reply, key: str = "content", index: int = 0) -> list[str]:
    choices = [c for e in reply.events() if isinstance(e, dict) for c in e["choices"]]
    return [
        c["delta"][key] for c in choices if c["index"] == index and key in c.get("delta", {})
    ]  # fmt: skip


async def metric(app: SimulatedEngine, name: str, **labels: str) -> float | None:
    page = (await get(app, "/metrics")).body.decode()
    return next(
        (
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and {"model_name": "org/m", **labels} == sample.labels
        ),
        None,
    )


async def test_a_whole_answer_says_that_it_is_simulated(autojump_clock: object) -> None:
    reply = await fetch(engine(), CHAT, ask(max_tokens=12), headers={"x-request-id": "abc"})

    answer = reply.json()
    assert (reply.status, reply.headers["x-simulated"]) == (200, "true")
    assert reply.headers["server"] == "citadel-sim"
    assert (answer["id"], answer["system_fingerprint"]) == ("chatcmpl-abc", "simulated")
    assert answer["choices"][0]["message"]["content"].startswith("[simulated org/m]")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12


async def test_a_stream_is_a_role_then_a_delta_per_token_then_a_reason_then_done(
    autojump_clock: object,
) -> None:
    reply = await fetch(engine(), CHAT, ask(stream=True, max_tokens=5))
    first, *tokens, finish, done = reply.events()

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert first["choices"][0]["delta"] == {"role": "assistant"}
    assert [set(token["choices"][0]["delta"]) for token in tokens] == [{"content"}] * 5
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "length")
    assert done == "[DONE]"
    assert len({event["id"] for event in [first, *tokens, finish]}) == 1
    assert all("usage" not in event for event in [first, *tokens, finish])


@pytest.mark.parametrize("limit", [1, 3, 40, None])
async def test_deltas_usage_and_the_whole_answer_agree(
    autojump_clock: object, limit: int | None
) -> None:
    app = engine()
    options = {"include_usage": True}
    stream = await fetch(app, CHAT, ask(stream=True, stream_options=options, max_tokens=limit))
    whole = (await fetch(app, CHAT, ask(max_tokens=limit))).json()

    usage = stream.events()[-2]
    assert usage["choices"] == []
    assert len(deltas(stream)) == usage["usage"]["completion_tokens"]
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert "".join(deltas(stream)) == whole["choices"][0]["message"]["content"]


async def test_usage_is_told_with_every_chunk_when_asked(autojump_clock: object) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = await fetch(engine(), CHAT, ask(stream=True, stream_options=options, max_tokens=2))

    counts = [event["usage"]["completion_tokens"] for event in reply.events()[:-1]]
    assert counts == [0, 1, 2, 2, 2]


async def test_several_choices_are_made_side_by_side(autojump_clock: object) -> None:
    began = trio.current_time()
    reply = await fetch(
        engine(prefill_rate=math.inf), CHAT, ask(stream=True, n=2, max_tokens=5)
    )  # fmt: skip

    assert trio.current_time() - began == 1
    assert len(deltas(reply, index=0)) == len(deltas(reply, index=1)) == 5
    finished = [e for e in reply.events()[:-1] if e["choices"][0]["finish_reason"]]
    assert [e["choices"][0]["index"] for e in finished] == [0, 1]


async def test_a_stop_string_ends_the_answer(autojump_clock: object) -> None:
    answer = (await fetch(engine(), CHAT, ask(stop="org"))).json()

    assert answer["choices"][0]["message"]["content"] == "[simulated "
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_plain_completions_take_texts_and_token_ids(autojump_clock: object) -> None:
    app = engine()
    many = (await fetch(app, TEXT, {"model": "org/m", "prompt": ["a b", "c"], "n": 2})).json()
    ids = (await fetch(app, TEXT, {"model": "org/m", "prompt": [1, 2, 3]})).json()

    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert (many["object"], many["usage"]["prompt_tokens"]) == ("text_completion", 3)
    assert many["usage"]["completion_tokens"] == 4 * 16
    assert ids["usage"]["prompt_tokens"] == 3


async def test_plain_completions_stream_text(autojump_clock: object) -> None:
    body = {"model": "org/m", "prompt": "a b", "stream": True, "max_tokens": 3}
    *tokens, finish, done = (await fetch(engine(), TEXT, body)).events()

    assert "".join(event["choices"][0]["text"] for event in tokens) == "[simulated"
    assert (len(tokens), finish["choices"][0]["finish_reason"], done) == (3, "length", "[DONE]")


async def test_reading_takes_time_and_each_token_after_the_first_too(
    autojump_clock: object,
) -> None:
    began = trio.current_time()
    prompt = {"model": "org/m", "prompt": " word" * 64, "stream": True, "max_tokens": 5}
    reply = await fetch(engine(), TEXT, prompt)

    times = [at - began for at, _ in reply.chunks]
    assert times == [0.5, 0.75, 1.0, 1.25, 1.5, 1.5, 1.5]


async def test_a_fuller_batch_is_slower_for_each(autojump_clock: object) -> None:
    app, began = engine(prefill_rate=math.inf), trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(fetch, app, CHAT, ask(max_tokens=5))

    assert trio.current_time() - began == 4 * 0.25 * (1 + 2 * 0.5)


async def test_a_prompt_read_before_is_cached_and_free(autojump_clock: object) -> None:
    app, prompt = engine(), {"model": "org/m", "prompt": " word" * 129, "max_tokens": 1}
    await fetch(app, TEXT, prompt)
    began = trio.current_time()
    again = (await fetch(app, TEXT, prompt)).json()

    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 128}
    assert trio.current_time() - began == 1 / 128
    assert await metric(app, "vllm:prefix_cache_hits_total") == 128
    assert await metric(app, "vllm:prefix_cache_queries_total") == 258


async def test_jitter_moves_time_by_no_more_than_its_share(autojump_clock: object) -> None:
    app, began = engine(prefill_rate=math.inf, jitter=0.5), trio.current_time()
    await fetch(app, CHAT, ask(max_tokens=9))

    assert 1 <= trio.current_time() - began <= 3
    assert trio.current_time() - began != 2


async def test_a_full_queue_says_503_and_when_to_come_back(autojump_clock: object) -> None:
    app = engine(max_batch=1, max_queue=0)
    async with calling(app, CHAT, ask(stream=True)):
        await wait_all_tasks_blocked()
        reply = await fetch(app, CHAT, ask(stream=True))

    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert [entry.ended for entry in app.ledger.entries] == ["rejected", "aborted"]


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_while_running_frees_the_place_at_once(
    autojump_clock: object, stream: bool
) -> None:
    app = engine(prefill_rate=math.inf)
    async with calling(app, CHAT, ask(stream=stream), headers={"x-request-id": "me"}) as call:
        await trio.sleep(0.6)
        before = trio.current_time()
        await call.hang_up()

        assert trio.current_time() == before
    assert (app.scheduler.running, app.scheduler.aborted) == (0, 1)
    (entry,) = app.ledger.of("me")
    assert (entry.ended, entry.completion_tokens) == ("aborted", 3)
    labels = {"finished_reason": "abort"}
    assert await metric(app, "vllm:request_success_total", **labels) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_in_the_queue_lets_the_next_one_move_up(
    autojump_clock: object, stream: bool
) -> None:
    app = engine(max_batch=1, max_queue=2)
    async with calling(app, CHAT, ask(stream=True)) as running:
        await wait_all_tasks_blocked()
        async with calling(app, CHAT, ask(stream=stream)) as queued:
            await wait_all_tasks_blocked()
            assert (app.scheduler.running, app.scheduler.waiting) == (1, 1)
            await queued.hang_up()
            assert (app.scheduler.running, app.scheduler.waiting) == (1, 0)
        await running.done.wait()

    assert running.reply.events()[-1] == "[DONE]"
    assert [entry.ended for entry in app.ledger.entries] == ["aborted", "finished"]


async def test_hanging_up_before_the_body_is_complete_is_no_error() -> None:
    app = engine()
    messages: Iterator[dict[str, Any]] = iter(
        [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: object) -> None:
        pytest.fail(f"sent {message}")

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await app(scope, receive, send)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (CHAT, b"{", 400, "not JSON"),
        (CHAT, b"[]", 400, "JSON object"),
        (CHAT, {"messages": []}, 400, "`model`"),
        (CHAT, {**ask(), "model": "gpt-5"}, 404, "The model `gpt-5` does not exist."),
        (CHAT, {"model": "org/m", "messages": []}, 400, "`messages`"),
        (CHAT, {"model": "org/m", "messages": "hi"}, 400, "`messages`"),
        (CHAT, {"model": "org/m", "messages": [{"content": "hi"}]}, 400, "`role`"),
        (CHAT, ask(max_tokens="9"), 400, "`max_tokens` must be an integer"),
        (CHAT, ask(max_tokens=0), 400, "`max_tokens` must be at least 1"),
        (CHAT, ask(n=999), 400, "`n` must be from 1 to 128"),
        (CHAT, ask(stream="yes"), 400, "`stream`"),
        (CHAT, ask(stop=[1]), 400, "`stop`"),
        (CHAT, ask(temperature="hot"), 400, "`temperature`"),
        (CHAT, ask(stream_options={}), 200, ""),
        (CHAT, ask(stream_options={"include_usage": True}), 400, "Stream options"),
        (CHAT, ask(" x" * 400), 400, "This model's maximum context length is 400 tokens."),
        (CHAT, ask(max_tokens=399), 400, "'max_tokens' or 'max_completion_tokens' is too large"),
        (TEXT, {"model": "org/m"}, 400, "`prompt`"),
        (TEXT, {"model": "org/m", "prompt": []}, 400, "`prompt`"),
        (EMBED, {"model": "org/m", "input": {}}, 400, "`input`"),
        (EMBED, {"model": "org/m", "input": "a", "encoding_format": "hex"}, 400, "encoding"),
        (EMBED, {"model": "org/m", "input": "a", "dimensions": 9999}, 400, "`dimensions`"),
        ("/v1/nothing", {}, 404, "nothing at /v1/nothing"),
        ("/health", {}, 405, "does not take POST"),
    ],
)
async def test_bad_requests_are_told_what_is_wrong_in_openais_shape(
    autojump_clock: object, path: str, body: object, status: int, words: str
) -> None:
    reply = await fetch(engine(), path, body)

    assert reply.status == status
    if status != 200:
        assert words in reply.json()["error"]["message"]
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.json()["system_fingerprint"] == "simulated"


async def test_messages_may_have_parts_and_no_content_at_all(autojump_clock: object) -> None:
    messages = [
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = await fetch(engine(), CHAT, {"model": "org/m", "messages": messages, "tools": tools})

    assert "Hi<image_url>" in reply.json()["choices"][0]["message"]["content"]


async def test_embeddings_come_as_floats_or_base64_and_say_that_they_are_simulated(
    autojump_clock: object,
) -> None:
    app, body = engine(), {"model": "org/m", "input": ["one", "two three"], "dimensions": 8}
    floats = (await fetch(app, EMBED, body)).json()
    encoded = (await fetch(app, EMBED, {**body, "encoding_format": "base64"})).json()

    assert (floats["simulated"], floats["usage"]["prompt_tokens"]) == (True, 3)
    assert math.hypot(*floats["data"][1]["embedding"]) == pytest.approx(1, abs=1e-6)
    assert len(base64.b64decode(encoded["data"][1]["embedding"])) == 8 * 4
    assert floats["data"][0]["embedding"] != floats["data"][1]["embedding"]


async def test_models_are_listed_and_found_under_names_with_slashes() -> None:
    app = engine()

    assert [m["id"] for m in (await get(app, "/v1/models")).json()["data"]] == ["org/m"]
    assert (await get(app, "/v1/models/org/m")).json()["max_model_len"] == 400
    assert (await get(app, "/v1/models/org")).status == 404
    assert (await get(app, "/health")).status == 200
    assert (await get(app, "/version")).json()["version"] == "citadel-sim"


async def test_metrics_have_vllms_names_and_levels_as_they_are(autojump_clock: object) -> None:
    app = engine(max_batch=1, prefill_rate=math.inf, kv_tokens=100)
    async with calling(app, CHAT, ask(max_tokens=3)) as one, calling(app, CHAT, ask()) as two:
        await wait_all_tasks_blocked()
        assert await metric(app, "vllm:num_requests_running") == 1
        assert await metric(app, "vllm:num_requests_waiting") == 1
        assert 0 < (await metric(app, "vllm:kv_cache_usage_perc") or 0) < 1
        await one.done.wait()
        await two.done.wait()

    assert await metric(app, "vllm:generation_tokens_total") == sum(
        entry.completion_tokens for entry in app.ledger.entries
    )
    assert await metric(app, "vllm:prompt_tokens_total") == sum(
        entry.prompt_tokens for entry in app.ledger.entries
    )
    assert await metric(app, "vllm:time_to_first_token_seconds_count") == 2
    for reason in ("length", "stop"):
        assert await metric(app, "vllm:request_success_total", finished_reason=reason) == 1


async def test_the_ledger_is_read_over_http(autojump_clock: object) -> None:
    app = engine()
    await fetch(app, CHAT, ask(max_tokens=3), headers={"X-Request-Id": "abc"})

    told = (await get(app, "/sim/ledger")).json()
    assert (told["finished"], told["running"]) == (1, 0)
    assert (told["entries"][0]["id"], told["entries"][0]["ended"]) == ("abc", "finished")
    assert told["entries"][0]["completion_tokens"] == 3


async def test_created_comes_from_the_wall_clock_it_is_given(autojump_clock: object) -> None:
    app = create_engine_app(PROFILE, wall=lambda: 1_800_000_000.5)

    assert (await fetch(app, CHAT, ask())).json()["created"] == 1_800_000_000


async def test_the_lifespan_is_answered() -> None:
    asked = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    answered: list[str] = []

    async def receive() -> dict[str, str]:
        return next(asked)

    async def send(message: Any) -> None:
        answered.append(message["type"])

    await engine()({"type": "lifespan"}, receive, send)

    assert answered == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
