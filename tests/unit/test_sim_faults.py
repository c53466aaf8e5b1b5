"""Choosing faults (pure), then what each looks like to a client of the engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio

from citadel_gateway.sim import AbortConnection, EngineProfile, Fault, create_engine_app
from citadel_gateway.sim.app import SimulatedEngine
from citadel_gateway.sim.faults import Faults, parse_faults
from tests.support.sim_driver import calling, fetch, get

CHAT = "/v1/chat/completions"
EMBED = "/v1/embeddings"
# Binary fractions, so that virtual time is exact: reading is free, a token takes 1/4 s.
PROFILE = EngineProfile(model="m", prefill_rate=float("inf"), decode_rate=4, crowding=0)


def engine(*faults: Fault) -> SimulatedEngine:
    return create_engine_app(PROFILE, faults=faults)


def ask(**more: Any) -> dict[str, Any]:
    return {
        "model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **more
    }  # fmt: skip


def contents(events: list[Any]) -> int:
    deltas = [e["choices"][0]["delta"] for e in events if isinstance(e, dict) and "choices" in e]
    return sum("content" in delta for delta in deltas)


def test_a_count_is_used_up_and_the_next_fault_takes_over() -> None:
    faults = Faults(random.Random(0), [Fault("error", count=2), Fault("hang", count=1)])

    kinds = [fault and fault.kind for fault in (faults.choose(CHAT) for _ in range(4))]

    assert kinds == ["error", "error", "hang", None]
    assert [left["count"] for left in faults.as_json()] == [0, 0]


def test_a_rate_hits_about_that_share() -> None:
    faults = Faults(random.Random(0), [Fault("error", rate=0.25)])

    assert 200 < sum(faults.choose(CHAT) is not None for _ in range(1000)) < 300


def test_filters_keep_a_fault_to_its_models_and_paths() -> None:
    faults = Faults(random.Random(0), [Fault("error", models=("a",), paths=(EMBED,))])

    assert faults.choose(EMBED, "a") is not None
    assert faults.choose(EMBED, "b") is None
    assert faults.choose(CHAT, "a") is None


def test_a_fault_of_streams_leaves_embeddings_alone() -> None:
    faults = Faults(random.Random(0), [Fault("cut", count=1)])

    assert faults.choose(EMBED) is None
    assert faults.choose(CHAT) is not None


@pytest.mark.parametrize(
    "raw",
    [
        {},
        ["error"],
        [{}],
        [{"kind": "nonsense"}],
        [{"kind": "error", "surprise": 1}],
        [{"kind": "error", "status": 200}],
        [{"kind": "error", "rate": 2}],
        [{"kind": "error", "count": True}],
        [{"kind": "error", "models": "m"}],
        [{"kind": "hang", "delay": -1}],
    ],
)
def test_faults_that_make_no_sense_are_refused(raw: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_faults(raw)


@pytest.mark.parametrize(
    ("fault", "status", "seen"),
    [
        (Fault("error", status=502), 502, b'"error":{"message"'),
        (Fault("vllm_error", status=400), 400, b'"object":"error"'),
        (Fault("rate_limit"), 429, b"rate_limit_exceeded"),
        (Fault("overloaded"), 503, b"overloaded"),
        (Fault("loading"), 503, b"Loading model"),
        (Fault("html"), 200, b"<!doctype html>"),
        (Fault("not_json"), 200, b"not JSON"),
        (Fault("empty"), 200, b""),
        (Fault("redirect"), 307, b""),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_canned_answer_takes_the_place_of_the_engines_own(
    fault: Fault, status: int, seen: bytes, stream: bool
) -> None:
    app = engine(fault)
    reply = await fetch(app, CHAT, ask(stream=stream))

    assert (reply.status, reply.complete, reply.error) == (status, True, None)
    assert seen in reply.body
    assert [(e.ended, e.fault) for e in app.ledger.entries] == [("failed", fault.kind)]


@pytest.mark.parametrize("kind", ["rate_limit", "overloaded"])
async def test_refusals_by_load_say_when_to_come_back(kind: str) -> None:
    reply = await fetch(engine(Fault(kind, retry_after=2.5)), CHAT, ask())

    assert reply.headers["retry-after"] == "3"


async def test_while_loading_the_health_check_says_so_and_uses_up_no_count() -> None:
    app = engine(Fault("loading", count=1))

    assert (await get(app, "/health")).status == 503
    assert (await get(app, "/v1/models")).status == 503
    assert (await fetch(app, CHAT, ask())).status == 503
    assert (await get(app, "/health")).status == 200


async def test_a_fault_may_name_the_health_check(autojump_clock: object) -> None:
    app = engine(Fault("error", paths=("/health",), delay=3))
    began = trio.current_time()

    assert (await get(app, "/health")).status == 500
    assert trio.current_time() - began == 3
    assert (await fetch(app, CHAT, ask())).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hang_sends_no_head_until_the_client_gives_up(
    autojump_clock: object, stream: bool
) -> None:
    app = engine(Fault("hang"))
    async with calling(app, CHAT, ask(stream=stream)) as call:
        await trio.sleep(3600)
        await call.hang_up()

    assert call.reply.status == 0
    assert [(e.ended, e.fault) for e in app.ledger.entries] == [("aborted", "hang")]


async def test_a_hang_with_a_delay_is_a_slow_head(autojump_clock: object) -> None:
    began = trio.current_time()
    reply = await fetch(engine(Fault("hang", delay=5)), CHAT, ask())

    assert reply.status == 200
    assert trio.current_time() - began == 5.75


async def test_a_slow_first_token_comes_after_a_prompt_head(autojump_clock: object) -> None:
    async with calling(engine(Fault("slow_first_token", delay=8)), CHAT, ask(stream=True)) as call:
        began = trio.current_time()
        await trio.sleep(7.5)
        assert (call.reply.status, call.reply.chunks) == (200, [])
        await call.done.wait()

    assert call.reply.chunks[0][0] - began == 8
    assert contents(call.reply.events()) == 4


async def test_a_stall_is_silence_after_so_many_tokens(autojump_clock: object) -> None:
    app = engine(Fault("stall", after_tokens=2))
    async with calling(app, CHAT, ask(stream=True)) as call:
        await trio.sleep(3600)
        assert contents(call.reply.events()) == 2
        await call.hang_up()

    assert (app.ledger.entries[0].ended, app.ledger.entries[0].completion_tokens) == ("aborted", 2)


async def test_a_stall_with_a_delay_goes_on_after_it(autojump_clock: object) -> None:
    began = trio.current_time()
    reply = await fetch(engine(Fault("stall", after_tokens=2, delay=10)), CHAT, ask(stream=True))

    assert reply.events()[-1] == "[DONE]"
    assert trio.current_time() - began == 10.75


async def test_a_cut_leaves_the_body_without_an_end(autojump_clock: object) -> None:
    app = engine(Fault("cut", after_tokens=3))
    reply = await fetch(app, CHAT, ask(stream=True))

    assert isinstance(reply.error, AbortConnection)
    assert (contents(reply.events()), reply.complete) == (3, False)
    assert app.ledger.entries[0].ended == "failed"
    assert app.scheduler.running == 0


async def test_a_fault_never_comes_later_than_the_last_token(autojump_clock: object) -> None:
    reply = await fetch(engine(Fault("cut", after_tokens=99)), CHAT, ask(stream=True))

    assert isinstance(reply.error, AbortConnection)
    assert contents(reply.events()) == 4


async def test_a_clean_cut_looks_like_an_end_without_a_reason(autojump_clock: object) -> None:
    reply = await fetch(engine(Fault("clean_cut", after_tokens=3)), CHAT, ask(stream=True))

    assert (reply.complete, reply.error) == (True, None)
    assert contents(reply.events()) == 3
    assert all(event["choices"][0]["finish_reason"] is None for event in reply.events())


async def test_no_done_lacks_only_the_last_event(autojump_clock: object) -> None:
    reply = await fetch(engine(Fault("no_done")), CHAT, ask(stream=True))

    assert reply.complete
    assert reply.events()[-1]["choices"][0]["finish_reason"] == "length"


async def test_an_error_event_ends_the_stream(autojump_clock: object) -> None:
    reply = await fetch(engine(Fault("error_event", after_tokens=1)), CHAT, ask(stream=True))

    *_, error, done = reply.events()
    assert (error["error"]["code"], done) == (500, "[DONE]")
    assert contents(reply.events()) == 1


async def test_a_malformed_event_sits_in_a_stream_that_is_otherwise_whole(
    autojump_clock: object,
) -> None:
    reply = await fetch(engine(Fault("malformed_event", after_tokens=1)), CHAT, ask(stream=True))

    assert b'data: {"id": "chatcmpl-\n\n' in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n")


async def test_half_a_body_promises_more_than_it_sends() -> None:
    reply = await fetch(engine(Fault("half_body")), CHAT, ask())

    assert isinstance(reply.error, AbortConnection)
    assert int(reply.headers["content-length"]) == 2 * len(reply.body)


async def test_a_cut_whole_answer_ends_in_its_middle(autojump_clock: object) -> None:
    reply = await fetch(engine(Fault("cut")), CHAT, ask())

    assert isinstance(reply.error, AbortConnection)
    assert int(reply.headers["content-length"]) > len(reply.body) > 0


@pytest.mark.parametrize("kind", ["clean_cut", "malformed_event"])
async def test_a_whole_answer_may_be_half_a_json_with_a_matching_length(
    autojump_clock: object, kind: str
) -> None:
    reply = await fetch(engine(Fault(kind)), CHAT, ask())

    assert (reply.status, reply.complete) == (200, True)
    assert int(reply.headers["content-length"]) == len(reply.body)
    with pytest.raises(ValueError, match="unexpected"):
        reply.json()


async def test_an_error_event_of_a_whole_answer_is_a_500(autojump_clock: object) -> None:
    reply = await fetch(engine(Fault("error_event", after_tokens=2)), CHAT, ask())

    assert (reply.status, reply.json()["error"]["type"]) == (500, "InternalServerError")


async def test_faults_are_set_and_read_and_cleared_over_http() -> None:
    app = engine()
    put = await fetch(app, "/sim/faults", [{"kind": "error", "count": 1}], method="PUT")
    assert put.json()[0]["kind"] == "error"
    assert (await fetch(app, CHAT, ask())).status == 500
    assert (await get(app, "/sim/faults")).json()[0]["count"] == 0

    assert (await fetch(app, "/sim/faults", method="DELETE")).json() == []
    bad = await fetch(app, "/sim/faults", [{"kind": "error", "rate": "much"}], method="PUT")
    assert bad.status == 400
    assert "rate" in bad.json()["error"]["message"]


async def test_the_controls_cannot_be_made_to_fail() -> None:
    app = engine(Fault("error", paths=("/sim/faults",)))

    assert (await get(app, "/sim/faults")).status == 200
