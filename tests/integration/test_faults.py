"""Engines that fail in every way we know: what the client gets, when, and what is learnt of it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import attrs
import orjson
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.policy.circuit_breaker import State
from tests.support import scripted_engine as engines
from tests.support.gateway import (
    CHAT,
    World,
    chat,
    endpoint,
    events,
    fleet,
    gather,
    running_gateway,
    words,
)
from tests.support.ledger import total
from tests.support.raw_client import RawResponse, http_request
from tests.support.scripted_engine import LedgerEntry, Script, hang, send

IDLE = 4.0  # seconds after which no connection of the probes is left in the pool
TIMEOUTS = {"headers": 5, "first_token": 8, "idle": 3}
ERROR_KEYS = {"message", "type", "param", "code"}
LATER = [("retry-after", "50")]  # too late for whoever asks now
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@attrs.frozen
class Told:
    """A whole error: what the client is told if nobody else answers, and when."""

    status: int
    code: str
    after: float = 0.0
    elsewhere: bool = True  # somebody else may be asked instead
    counts: bool = True  # against the breaker


@attrs.frozen
class Cut:
    """A stream that broke after its client had got *words*."""

    code: str
    words: str = "tok0 tok1 tok2 "
    after: float = 0.0
    counts: bool = True


@attrs.frozen
class Fine:
    """An odd answer, and yet one."""

    after = 0.0


Expected = Told | Cut | Fine


@attrs.frozen
class Fault:
    name: str
    script: Script | str
    expected: Expected
    when: tuple[bool, ...] = (False, True)  # not streamed, streamed


def error(message: str, **fields: Any) -> bytes:
    return orjson.dumps({"error": {"message": message, **fields}})


def raw(data: bytes, *, end: bool = True) -> Script:
    """The bytes as they are, then a FIN or silence."""
    return Script([send(data), engines.close() if end else hang()])


def gzipped(kind: str) -> Script:
    return engines.status(
        200, b"\x1f\x8b\x08\x00nonsense", [("content-encoding", "gzip"), ("content-type", kind)]
    )


def good_with(*headers: bytes) -> Script:
    """A good answer, whole and not streamed, but for some lines of its head."""
    body = b'{"choices":[]}'
    head = b"".join(line + b"\r\n" for line in headers)
    return raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + head + b"\r\n" + body)


REFUSED = Told(502, "upstream_connection_error")
NONSENSE = Told(502, "upstream_protocol_error")
WHOLE, STREAMED = (False,), (True,)

FAULTS = [
    Fault("refuses connections", "refuse", REFUSED),
    Fault("never accepts", "blackhole", Told(504, "timeout_connect", 2)),
    Fault("never answers", Script([hang()]), Told(504, "timeout_headers", 5)),
    Fault("half a head, then silence", raw(b"HTTP/1.1 200 O", end=False),
          Told(504, "timeout_headers", 5)),
    Fault("head, then silence", engines.stall_after(0), Told(504, "timeout_first_token", 8),
          STREAMED),
    Fault("head, then silence", engines.stall_after(0),
          Told(504, "timeout_total", 30, elsewhere=False), WHOLE),
    Fault("hangs up at once", Script([engines.close()]), REFUSED),
    Fault("half a head", raw(b"HTTP/1.1 200 O"), REFUSED),
    Fault("hangs up after the head", engines.cut_after(0), REFUSED),
    Fault("half a body", engines.half_body(), REFUSED, WHOLE),
    Fault("silence in the stream", engines.stall_after(3), Cut("timeout_idle", after=3), STREAMED),
    Fault("reset in the stream", engines.reset_after(3), Cut("upstream_connection_error"),
          STREAMED),
    Fault("hangs up in the stream", engines.cut_after(3), Cut("upstream_connection_error"),
          STREAMED),
    Fault("hangs up within a chunk", engines.cut_after(3, mid_chunk=True),
          Cut("upstream_connection_error"), STREAMED),
    Fault("no end to the answer", engines.no_finish(3), Cut("upstream_connection_error"),
          STREAMED),
    Fault("error in the stream", engines.error_event(2), Cut("upstream_500", "tok0 tok1 "),
          STREAMED),
    Fault("error instead of a stream", engines.error_event(0), Told(500, "upstream_500"),
          STREAMED),
    Fault("garbage", engines.garbage(), NONSENSE),
    Fault("HTTP/0.9", raw(b"<html>hello</html>"), NONSENSE),
    Fault("an impossible status", raw(b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n"), NONSENSE),
    Fault("status 600", engines.status(600), NONSENSE),
    Fault("status 204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), NONSENSE),
    Fault("a head without end", raw(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 300_000), NONSENSE),
    Fault("a web page", engines.html(), NONSENSE),
    Fault("nothing", engines.empty(), NONSENSE),
    Fault("half of JSON", engines.status(200, b'{"id":'), NONSENSE),
    Fault("JSON that is no answer", engines.status(200, b"[]"), NONSENSE),
    Fault("compressed", gzipped("application/json"), NONSENSE, WHOLE),
    Fault("compressed", gzipped("text/event-stream"), NONSENSE, STREAMED),
    Fault("a header without colon", good_with(b"what is this"), NONSENSE),
    Fault("two lengths", good_with(b"content-length: 14", b"content-length: 15"), NONSENSE, WHOLE),
    Fault("a negative length", good_with(b"content-length: -14"), NONSENSE, WHOLE),
    Fault("status 000", raw(b"HTTP/1.1 000 \r\ncontent-length: 0\r\n\r\n"), NONSENSE),
    Fault("a chunk of no size", good_with(b"transfer-encoding: chunked"), NONSENSE, WHOLE),
    Fault("switches protocols", engines.switching_protocols(), NONSENSE),
    Fault("interim responses for ever", engines.continues(2000), NONSENSE),
    Fault("comments for ever", raw(STREAM_HEAD + b": hm\n\n" * 2**16, end=False), NONSENSE,
          STREAMED),
    Fault("malformed events", raw(STREAM_HEAD + b"data: {\n\n" * 10), NONSENSE, STREAMED),
    Fault("an event without end", raw(STREAM_HEAD + b"data: " + b"x" * 2**21, end=False), NONSENSE,
          STREAMED),
    Fault("redirects", engines.redirect("http://169.254.169.254/"), Told(502, "upstream_redirect")),
    Fault("an error with status 200", engines.status(200, error("no memory", code="oom")),
          Told(502, "oom")),
    Fault("status 500", engines.status(500, error("bug")), Told(500, "upstream_500")),
    Fault("status 502, a web page", engines.html(502), Told(502, "upstream_502")),
    Fault("status 504", engines.status(504), Told(504, "upstream_504")),
    Fault("loading", engines.loading(), Told(503, "upstream_overloaded")),
    Fault("status 503, come again", engines.status(503, b"", LATER),
          Told(503, "upstream_overloaded", counts=False)),
    Fault("status 429", engines.status(429, b"", LATER),
          Told(429, "upstream_overloaded", counts=False)),
    Fault("status 408", engines.status(408), Told(408, "upstream_408", counts=False)),
    Fault("status 401", engines.status(401, error("who?")),
          Told(502, "upstream_credentials_exhausted", counts=False)),
    Fault("status 403", engines.status(403, error("you?")),
          Told(502, "upstream_credentials_exhausted", counts=False)),
    Fault("status 404", engines.status(404, error("what?", code="model_not_found")),
          Told(404, "model_not_found", counts=False)),
    Fault("status 400", engines.status(400, error("no", code="bad_top_k")),
          Told(400, "bad_top_k", elsewhere=False, counts=False)),
    Fault("status 422", engines.status(422, b'{"detail":"no"}'),
          Told(422, "upstream_422", elsewhere=False, counts=False)),
    Fault("refuses before the body", engines.early_status(413, error("too long")),
          Told(413, "upstream_413", elsewhere=False, counts=False)),
    Fault("some interim responses", engines.continues(3), Fine(), WHOLE),
    Fault("no length", engines.close_delimited(), Fine(), WHOLE),
    Fault("one answer too many", engines.surplus(), Fine(), WHOLE),
    Fault("lingers behind its end", engines.lingers(), Fine(), STREAMED),
    Fault("no [DONE]", engines.stream_chat(["tok0 "], done=False), Fine(), STREAMED),
]  # fmt: skip

CASES = [
    pytest.param(fault, stream, id=f"{fault.name}, {'streamed' if stream else 'whole'}")
    for fault in FAULTS
    for stream in fault.when
]
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "alone": {"m": {"endpoints": [{"url": endpoint("bad")}]}},
    "second endpoint": {
        "m": {
            "endpoints": [{"url": endpoint("bad")}, {"url": endpoint("good")}],
            "engine": "vllm",  # it can be told to go on with what another has begun
        }
    },
    "fallback": {
        "m": {"endpoint": endpoint("bad"), "fallbacks": ["other"]},
        "other": {"endpoint": endpoint("good")},
    },
}


def balancing(**options: Any) -> dict[str, Any]:
    """No retry is refused for want of budget, unless *options* say so."""
    return {"retry_budget_floor": 1000, **options}


def gateway_for(layout: str, **options: Any) -> Any:
    return fleet(
        LAYOUTS[layout], load_balancer=balancing(**options), performance={"timeouts": TIMEOUTS}
    )


def break_engine(world: World, script: Script | str) -> None:
    match script:
        case "refuse":
            world.net.refuse("bad", 8000)
        case "blackhole":
            world.net.blackhole("bad", 8000)
        case Script():
            world.engines["bad"].default = script


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_a_client_gets_a_good_answer_or_one_clear_error(
    autojump_clock: MockClock, fault: Fault, stream: bool, layout: str
) -> None:
    async with running_gateway(gateway_for(layout, circuit_breaker_threshold=1)) as world:
        await trio.sleep(IDLE)
        break_engine(world, fault.script)
        began = trio.current_time()
        response = await world.ask("m", stream=stream)
        took = trio.current_time() - began
        await trio.sleep(0.1)  # the client of a stream knows of its end before the books do
        opened = world.endpoint("bad").breaker.state(trio.current_time()) is State.OPEN
        metrics = await world.metrics()

    expected = fault.expected
    elsewhere = layout != "alone" and isinstance(expected, Told) and expected.elsewhere
    continued = layout == "second endpoint" and isinstance(expected, Cut)
    if isinstance(expected, Cut) and continued:
        assert (response.status, response.complete) == (200, True)
        assert words(response) == expected.words + "ok"
    elif isinstance(expected, Cut):
        assert_cut(response, expected)
    elif isinstance(expected, Fine) or elsewhere:
        assert (response.status, response.complete) == (200, True)
    else:
        assert_told(response, expected)
    attempts = 2 if elsewhere else 1
    assert took == pytest.approx(expected.after, abs=1e-9)
    assert response.header("x-citadel-attempts") == str(attempts)
    attempts += continued
    assert opened is (not isinstance(expected, Fine) and expected.counts)
    assert total(metrics, "citadel_gateway_attempts_total") == attempts
    assert total(metrics, "citadel_gateway_requests_total") == 1
    assert len(world.engines["bad"].posts) == (0 if isinstance(fault.script, str) else 1)
    if "good" in world.engines:
        assert len(world.engines["good"].posts) == (1 if elsewhere or continued else 0)
    if elsewhere:
        assert response.header("x-citadel-backend") == endpoint("good")
        assert response.header("x-citadel-model") == ("other" if layout == "fallback" else "m")


def assert_told(response: RawResponse, expected: Told) -> None:
    answer = response.json()["error"]
    assert (response.status, answer["code"]) == (expected.status, expected.code)
    assert response.complete
    assert set(answer) == ERROR_KEYS
    assert answer["message"]
    assert response.header("content-type") == "application/json"
    if expected.status in {429, 503}:
        assert response.header("retry-after")
        assert response.header("retry-after-ms")


def assert_cut(response: RawResponse, expected: Cut) -> None:
    *_, last = events(response)
    assert response.status == 200
    assert not response.complete
    assert words(response) == expected.words
    assert set(last["error"]) == ERROR_KEYS
    assert last["error"]["code"] == expected.code
    assert b"[DONE]" not in response.body


# --- the breaker -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_breaker_opens_at_the_fifth_failure_and_the_sixth_request_is_not_sent(
    autojump_clock: MockClock, stream: bool
) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].default = engines.status(500)
        failed = [await world.ask("m", stream=stream) for _ in range(5)]
        refused = await world.ask("m", stream=stream)

    assert [response.status for response in failed] == [500] * 5
    assert (refused.status, refused.json()["error"]["code"]) == (503, "no_healthy_backend")
    assert refused.header("x-citadel-attempts") == "0"
    assert 54 <= int(refused.header("retry-after") or 0) <= 66
    assert len(world.posts) == 5


async def test_streams_that_always_break_open_the_breaker(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].default = engines.cut_after(3)
        broken = [await world.ask("m", stream=True) for _ in range(5)]
        refused = await world.ask("m", stream=True)

    assert [response.status for response in broken] == [200] * 5
    assert refused.status == 503


async def test_a_success_between_failures_keeps_the_breaker_closed(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        bad, good = engines.status(500), engines.whole_chat("ok")
        world.engines["bad"].scripts.extend([*[bad] * 4, good, *[bad] * 4, good])
        statuses = [(await world.ask("m")).status for _ in range(10)]

    assert statuses == [*[500] * 4, 200, *[500] * 4, 200]


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
async def test_what_is_the_callers_fault_never_opens_the_breaker(
    autojump_clock: MockClock, status: int
) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].default = engines.status(status)
        for _ in range(100):
            await world.ask("m")
        world.engines["bad"].default = engines.whole_chat("ok")
        response = await world.ask("m")

    assert response.status == 200
    assert len(world.posts) == 101


async def test_half_open_admits_exactly_one_and_its_success_closes(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        engine = world.engines["bad"]
        await trip(world)
        engine.default = Script([engines.sleep(1), *engines.whole_chat("ok").steps])
        await trio.sleep(world.endpoint("bad").breaker.retry_after(trio.current_time()))
        answers = await gather(*[partial(world.ask, "m")] * 100)
        after = await world.ask("m")

    assert sorted(answer.status for answer in answers) == [200, *[503] * 99]
    assert all(answer.header("retry-after") for answer in answers if answer.status == 503)
    assert engine.max_in_flight == 1
    assert after.status == 200


async def test_a_failed_probe_doubles_the_rest(autojump_clock: MockClock) -> None:
    rests = []
    async with running_gateway(gateway_for("alone")) as world:
        await trip(world)
        for _ in range(6):
            rest = world.endpoint("bad").breaker.retry_after(trio.current_time())
            rests.append(rest)
            assert (await world.ask("m")).status == 503
            await trio.sleep(rest)
            assert (await world.ask("m")).status == 500

    for rest, nominal in zip(rests, [60, 120, 240, 300, 300, 300], strict=True):
        assert 0.9 * nominal <= rest <= 1.1 * nominal


async def test_a_probe_whose_client_left_gives_its_permit_back(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        engine = world.engines["bad"]
        await trip(world)
        await trio.sleep(world.endpoint("bad").breaker.retry_after(trio.current_time()))
        engine.scripts.append(Script([hang()]))
        async with world.client() as client:
            await client.send(http_request("POST", CHAT, chat("m")))
            await engine.wait_until(lambda: engine.in_flight == 1)
            meanwhile = await world.ask("m")
        await engine.wait_until(lambda: engine.in_flight == 0)
        engine.default = engines.whole_chat("ok")
        response = await world.ask("m")

    assert meanwhile.status == 503
    assert response.status == 200


async def test_one_bad_endpoint_of_three_is_noticed_by_nobody(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "bad", "c"]}, load_balancer=balancing())
    async with running_gateway(config) as world:
        world.engines["bad"].default = engines.status(500)
        answers = [await world.ask("m") for _ in range(60)]

    assert {answer.status for answer in answers} == {200}
    assert len(world.engines["bad"].posts) == 5


async def test_when_all_endpoints_are_open_the_fallback_answers(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("fallback", retry_ambiguous="never")) as world:
        await trip(world)
        response = await world.ask("m")

    assert (response.status, response.header("x-citadel-model")) == (200, "other")
    assert response.header("x-citadel-attempts") == "1"
    assert response.header("x-citadel-route-reason") == "fallback:other"


async def trip(world: World) -> None:
    world.engines["bad"].default = engines.status(500)
    for _ in range(5):
        assert (await world.ask("m")).status == 500


# --- cooling down ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("value", "seconds"), [("2", 2), ("2.5", 2.5), ("-1", 1), ("soon", 1), ("1e9", 60)]
)
async def test_an_endpoint_that_says_retry_after_is_left_alone_so_long(
    autojump_clock: MockClock, status: int, value: str, seconds: float
) -> None:
    async with running_gateway(gateway_for("alone", max_attempts=1)) as world:
        world.engines["bad"].scripts.append(engines.status(status, b"", [("retry-after", value)]))
        first = await world.ask("m")
        at_once = await world.ask("m")
        await trio.sleep(seconds - 0.125)
        too_early = await world.ask("m")
        await trio.sleep(0.125)
        in_time = await world.ask("m")

    statuses = [response.status for response in (first, at_once, too_early, in_time)]
    assert statuses == [status, 503, 503, 200]
    assert first.header("retry-after") == str(math.ceil(seconds))
    assert at_once.header("retry-after-ms") == str(math.ceil(seconds * 1000))
    assert too_early.header("retry-after-ms") == "125"


async def test_while_one_endpoint_cools_down_the_other_is_asked(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("second endpoint")) as world:
        world.engines["bad"].default = engines.status(429, b"", [("retry-after", "30")])
        answers = [await world.ask("m") for _ in range(10)]

    assert {answer.status for answer in answers} == {200}
    assert len(world.engines["bad"].posts) == 1


async def test_who_waits_is_called_when_an_endpoint_has_cooled_down(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["good", "bad"]}, load_balancer=balancing())
    for entry in config["models"]["m"]["endpoints"]:
        entry["max_concurrent"] = 1
    async with running_gateway(config) as world:
        world.engines["good"].default = Script([engines.sleep(9), *engines.whole_chat("ok").steps])
        world.engines["bad"].scripts.append(engines.status(429, b"", [("retry-after", "2.3")]))
        began = trio.current_time()
        answers = await gather(*[partial(world.ask, "m")] * 3)
        refused, served, *_ = (post.received_at - began for post in world.engines["bad"].posts)

    assert [answer.status for answer in answers] == [200] * 3
    assert served - refused == pytest.approx(2.3)


# --- how often -------------------------------------------------------------------------------


async def test_an_ambiguous_failure_is_repeated_once_at_most(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "b", "c"]}, load_balancer=balancing())
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = engines.status(500)
        response = await world.ask("m")

    assert response.status == 500
    assert response.header("x-citadel-attempts") == "2"
    assert len(world.posts) == 2


@pytest.mark.parametrize(
    "field", [{"store": True}, {"previous_response_id": "r"}, {"background": True}]
)
@pytest.mark.parametrize("script", [engines.status(500), Script([engines.close()])])
async def test_a_request_that_leaves_something_behind_is_never_executed_twice(
    autojump_clock: MockClock, field: dict[str, Any], script: Script
) -> None:
    async with running_gateway(gateway_for("second endpoint")) as world:
        world.engines["bad"].default = script
        response = await world.ask("m", **field)

    assert response.status >= 500
    assert len(world.posts) == 1


async def test_a_request_that_was_provably_not_executed_goes_elsewhere_even_so(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("second endpoint")) as world:
        world.engines["bad"].default = engines.status(429)
        response = await world.ask("m", store=True)

    assert (response.status, response.header("x-citadel-attempts")) == (200, "2")


async def test_ambiguous_failures_are_not_repeated_where_that_is_turned_off(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("second endpoint", retry_ambiguous="never")) as world:
        world.engines["bad"].default = engines.status(500)
        response = await world.ask("m")

    assert response.status == 500
    assert len(world.posts) == 1


async def test_a_connection_that_died_while_idle_costs_nobody_anything(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        await world.ask("m")
        world.engines["bad"].scripts.append(Script([engines.close()]))
        response = await world.ask("m")

    assert (response.status, response.header("x-citadel-attempts")) == (200, "2")
    assert [post.attempt for post in world.posts] == [1, 1, 2]


async def test_another_endpoint_is_asked_rather_than_the_one_that_hung_up(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("second endpoint")) as world:
        await world.ask("m")
        await world.ask("m")
        world.engines["bad"].default = Script([engines.close()])
        response = await world.ask("m")

    assert (response.status, response.header("x-citadel-attempts")) == (200, "2")
    assert len(world.posts) == 2 + 2


async def test_the_fallback_is_asked_rather_than_the_endpoint_that_hung_up(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(gateway_for("fallback")) as world:
        await world.ask("m")
        world.engines["bad"].default = Script([engines.close()])
        response = await world.ask("m")

    assert (response.status, response.header("x-citadel-attempts")) == (200, "2")
    assert [len(engine.posts) for engine in world.engines.values()] == [1 + 1, 1]


async def test_that_repetition_is_the_only_one(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        await world.ask("m")
        world.engines["bad"].default = Script([engines.close()])
        response = await world.ask("m")

    assert (response.status, response.json()["error"]["code"]) == (502, "upstream_connection_error")
    assert len(world.posts) == 1 + 2


async def test_no_more_endpoints_are_tried_than_allowed(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "b", "c", "d"]}, load_balancer=balancing(max_attempts=3))
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = engines.status(429)
        response = await world.ask("m")

    assert (response.status, response.header("x-citadel-attempts")) == (429, "3")
    assert [len(engine.posts) for engine in world.engines.values()] == [1, 1, 1, 0]


async def test_retries_and_fallbacks_share_a_budget(autojump_clock: MockClock) -> None:
    """One in ten of the requests of the last ten seconds, and one retry in ten seconds."""
    options = {"retry_budget_ratio": 0.1, "retry_budget_floor": 0.1, "max_attempts": 2}
    models = {
        "m": {"endpoint": endpoint("bad"), "fallbacks": ["other"], "max_concurrent": 1000},
        "other": {"endpoint": endpoint("good"), "max_concurrent": 1000},
    }
    async with running_gateway(
        fleet(
            models,
            load_balancer={**options, "circuit_breaker_threshold": 1000,
                           "circuit_breaker_min_requests": 1000},
        )
    ) as world:  # fmt: skip
        world.engines["bad"].default = engines.status(408)
        answers = [await world.ask("m") for _ in range(200)]

    served = sum(answer.status == 200 for answer in answers)
    assert served == len(world.engines["good"].posts) == 0.1 * 200 + 1
    assert len(world.engines["bad"].posts) == 200


async def test_a_client_whose_retry_was_not_afforded_is_told_not_to_retry(
    autojump_clock: MockClock,
) -> None:
    options = {"retry_budget_ratio": 0, "retry_budget_floor": 0.1}
    config = fleet({"m": ["a", "b"]}, load_balancer=options)
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = engines.status(408)
        answers = [await world.ask("m") for _ in range(2)]

    assert [answer.header("x-citadel-attempts") for answer in answers] == ["2", "1"]
    assert [answer.header("x-should-retry") for answer in answers] == [None, "false"]


async def test_attempts_of_one_request_carry_its_id(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("second endpoint")) as world:
        world.engines["bad"].default = engines.status(503)
        await world.ask("m", [("x-request-id", "r1")])

    assert [post.request_id for post in world.posts] == ["r1", "r1"]


async def test_a_context_too_long_goes_to_the_fallback_with_a_larger_one(
    autojump_clock: MockClock,
) -> None:
    models: dict[str, dict[str, Any]] = {
        "m": {"endpoints": [{"url": endpoint("bad")}, {"url": endpoint("good")}],
              "context_window": 4096, "fallbacks": ["small", "large"]},
        "small": {"context_window": 2048},
        "large": {"context_window": 8192},
    }  # fmt: skip
    too_long = engines.status(400, error("too long", code="context_length_exceeded"))
    async with running_gateway(fleet(models)) as world:
        world.engines["bad"].default = too_long
        response = await world.ask("m")

    assert response.header("x-citadel-model") == "large"
    assert [len(engine.posts) for engine in world.engines.values()] == [1, 0, 0, 1]


async def test_a_context_too_long_for_everybody_is_told_in_openais_words(
    autojump_clock: MockClock,
) -> None:
    message = b'{"object":"error","message":"This model\'s maximum context length is 8","code":400}'
    async with running_gateway(gateway_for("second endpoint")) as world:
        world.engines["bad"].default = engines.status(400, message)
        response = await world.ask("m")

    answer = response.json()["error"]
    assert (response.status, answer["code"]) == (400, "context_length_exceeded")
    assert answer["param"] == "messages"
    assert len(world.posts) == 1


# --- clocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "code"), [(False, "timeout_total"), (True, "timeout_first_token")]
)
async def test_a_client_may_shorten_the_time_and_that_is_nobodys_failure(
    autojump_clock: MockClock, stream: bool, code: str
) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].default = Script([hang()])
        for _ in range(6):
            began = trio.current_time()
            response = await world.ask("m", [("x-citadel-timeout", "1.5")], stream=stream)
            assert trio.current_time() - began == 1.5
            assert (response.status, response.json()["error"]["code"]) == (504, code)


async def test_a_client_may_not_lengthen_the_time(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = Script([hang()])
        began = trio.current_time()
        response = await world.ask("m", [("x-citadel-timeout", "900")])

    assert response.status == 504
    assert trio.current_time() - began == pytest.approx(30, abs=0.2)


async def test_every_attempt_shares_the_request_s_time(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("second endpoint")) as world:
        world.engines["bad"].default = Script([engines.sleep(4), *engines.status(503).steps])
        world.engines["good"].default = Script([hang()])
        began = trio.current_time()
        response = await world.ask("m", [("x-citadel-timeout", "6")])
        took = trio.current_time() - began

    assert (response.status, took) == (504, 6)


async def test_a_stream_outlives_the_request_timeout_once_it_runs(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.stream_chat(["x"] * 10, gap=15.0)
        response = await world.ask("m", stream=True)

    assert response.complete
    assert trio.current_time() > 130


async def test_a_stream_that_never_ends_is_cut_at_the_total_clock(
    autojump_clock: MockClock,
) -> None:
    timeouts = {"timeouts": {"total": 40}}
    async with running_gateway(fleet({"m": {}}, performance=timeouts)) as world:
        world.engines["m"].default = engines.stream_chat(["x"] * 100, gap=15.0)
        response = await world.ask("m", stream=True)

    assert_cut(response, Cut("timeout_total", "xxx"))


# --- what is written down --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_what_an_engine_says_is_for_the_client_alone(
    autojump_clock: MockClock, status: int, stream: bool
) -> None:
    """Engines quote prompts in their errors, and make up codes as they like."""
    canary = "tell-nobody"
    said = error(f"cannot parse {canary!r}", code=canary)
    streamed = stream and status == 200
    script = engines.status(status, said)
    if streamed:
        event = b"data: " + said + b"\n\n"
        script = engines.status(200, event, [("content-type", "text/event-stream")])
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].default = script
        response = await world.ask("m", stream=stream)
        page = await world.metrics_page()

    assert canary in response.body.decode()
    assert canary not in page
    (line,) = world.access_log
    assert "error" not in line


async def test_what_we_say_of_an_upstream_is_logged(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].default = engines.html()
        response = await world.ask("m")

    (line,) = world.access_log
    assert line["error"] == response.json()["error"]["message"]
    assert line["code"] == "upstream_protocol_error"


async def test_a_stream_that_never_began_has_no_first_token(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].scripts.append(engines.status(400))
        await world.ask("m", stream=True)
        before = await world.metrics()
        await world.ask("m", stream=True)
        await wait_all_tasks_blocked()  # the client has its end before the books are closed
        after = await world.metrics()

    name = "citadel_gateway_time_to_first_token_seconds_count"
    assert (total(before, name), total(after, name)) == (0, 1)


# --- all at once -----------------------------------------------------------------------------


async def test_an_engine_that_dies_with_many_streams_open_hangs_nobody(
    autojump_clock: MockClock,
) -> None:
    died = trio.Event()

    def doomed(entry: LedgerEntry) -> Script:
        return Script([*engines.cut_after(1).steps[:-1], engines.wait(died), engines.reset()])

    config = fleet(
        {"m": {"endpoint": endpoint("bad"), "max_concurrent": 200}},
        performance={"max_concurrent_requests": 200},
    )
    async with running_gateway(config) as world:
        world.engines["bad"].default = doomed

        async def kill() -> None:
            await world.engines["bad"].wait_until(lambda: world.engines["bad"].in_flight == 200)
            world.net.refuse("bad", 8000)
            died.set()

        *answers, _ = await gather(*[partial(world.ask, "m", stream=True)] * 200, kill)
        after = await world.ask("m")

    for answer in answers:
        assert_cut(answer, Cut("upstream_connection_error", "tok0 "))
    assert after.status == 503


async def test_an_answer_too_many_reaches_nobody(autojump_clock: MockClock) -> None:
    async with running_gateway(gateway_for("alone")) as world:
        world.engines["bad"].scripts.append(engines.surplus())
        first = await world.ask("m")
        second = await world.ask("m")

    texts = [r.json()["choices"][0]["message"]["content"] for r in (first, second)]
    assert texts == ["mine", "ok"]
