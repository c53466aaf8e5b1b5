"""Requests that are wrong: one clear error in OpenAI's shape, and nothing is sent upstream."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from tests.support.gateway import CHAT, CapturedLog, World, chat, fleet, running_gateway
from tests.support.ledger import parse_metrics, total
from tests.support.raw_client import Headers, RawClient, RawResponse, http_request

KEY = "sk-cit-a-" + "x" * 43
CANARY = "the-canary-in-the-prompt"
MESSAGES = [{"role": "user", "content": CANARY}]
ORIGIN = "https://chat.example.org"


@asynccontextmanager
async def careful_gateway(**sections: Any) -> AsyncIterator[World]:
    """A gateway whose engine must hear nothing, and whose log must not repeat the prompt."""
    async with running_gateway(fleet({"m": {}}, **sections)) as world:
        yield world
        assert world.posts == []
        assert CANARY not in json.dumps(world.log.lines)


def assert_refused(
    response: RawResponse, status: int, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """It is one whole error with all four fields; returns them."""
    assert response.complete
    assert response.header("content-type") == "application/json"
    assert response.header("x-content-type-options") in {None, "nosniff"}
    error: dict[str, Any] = response.json()["error"]
    assert list(response.json()) == ["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status, error["code"], error["param"]) == (status, code, param)
    assert error["message"]
    return error


# --- bodies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"nonsense",
        b'{"messages": []} and more',
        b"[]",
        b'"text"',
        b"12",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"messages": NaN}',
        b'{"messages": Infinity}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b"{'model': 'm'}",
        b'{"model": "m",}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
async def test_a_body_that_is_no_json_object(autojump_clock: MockClock, body: bytes) -> None:
    async with careful_gateway() as world:
        response = await world.send_body(body)

    assert response.status == 400
    assert_refused(response, 400, response.json()["error"]["code"])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": 7}, "model"),
        ({"model": ["m"]}, "model"),
        ({"model": "m" * 300}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [*MESSAGES, {"content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": "all"}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": []}, "top_p"),
        ({"stop": 3}, "stop"),
        ({"tools": {}}, "tools"),
        ({"user": 5}, "user"),
    ],
)
async def test_a_field_of_the_wrong_type_is_named(
    autojump_clock: MockClock, changes: dict[str, Any], param: str
) -> None:
    async with careful_gateway() as world:
        response = await world.send("POST", CHAT, {"model": "m", "messages": MESSAGES, **changes})

    error = assert_refused(response, 400, response.json()["error"]["code"], param)
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


@pytest.mark.parametrize(
    ("path", "field"),
    [(CHAT, "messages"), ("/v1/completions", "prompt"), ("/v1/embeddings", "input")],
)
@pytest.mark.parametrize("value", [None, [], 7])
async def test_the_field_that_everything_is_about_is_needed(
    autojump_clock: MockClock, path: str, field: str, value: Any
) -> None:
    async with careful_gateway() as world:
        absent = await world.send("POST", path, {"model": "m"})
        wrong = await world.send("POST", path, {"model": "m", field: value})

    assert_refused(absent, 400, "missing", field)
    assert_refused(wrong, 400, wrong.json()["error"]["code"], field)


@pytest.mark.parametrize("name", ["model", "stream", "messages", "max_tokens", "n"])
async def test_a_field_given_twice_is_refused(autojump_clock: MockClock, name: str) -> None:
    values = {"model": b'"m"', "stream": b"true", "messages": b"[]", "max_tokens": b"1", "n": b"1"}
    good = json.dumps({"messages": MESSAGES, "model": "m"}).encode()
    twice = b'"%s":%s,' % (name.encode(), values[name])
    async with careful_gateway() as world:
        response = await world.send_body(b"{" + twice + twice + good[1:])

    assert_refused(response, 400, "duplicate_key", name)


async def test_a_field_given_twice_in_disguise_is_refused(autojump_clock: MockClock) -> None:
    good = json.dumps({"messages": MESSAGES, "model": "m"}).encode()
    async with careful_gateway() as world:
        response = await world.send_body(b'{"mod\\u0065l":"other",' + good[1:])

    assert_refused(response, 400, "duplicate_key", "model")


@pytest.mark.parametrize(
    "model", ["gpt-7", "../../x", "M", "m\r\nx: y", "m\x00", "\u043c", "x" * 256]
)
async def test_an_unknown_model_is_no_label(autojump_clock: MockClock, model: str) -> None:
    async with careful_gateway() as world:
        response = await world.ask(model)
        metrics = await world.metrics()

    assert_refused(response, 404, "model_not_found", "model")
    assert total(metrics, "citadel_gateway_requests_total", outcome="unknown_model") == 1
    labels = {value for _, pairs in metrics for name, value in pairs if name == "model"}
    assert labels == {"m", "auto", "none"}


# --- sizes -----------------------------------------------------------------------------------

TWENTY_MB = 20 * 10**6


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(
    autojump_clock: MockClock,
) -> None:
    head = http_request("POST", CHAT, headers=[("content-length", str(TWENTY_MB))])
    async with careful_gateway() as world, world.client() as client:
        await client.send(head)
        response = await client.read_response("POST")

    error = assert_refused(response, 413, "request_too_large")
    assert "performance.max_body_bytes" in error["message"]
    assert response.header("connection") == "close"


async def test_a_client_that_sends_all_of_it_can_still_read_why_not(
    autojump_clock: MockClock,
) -> None:
    async with careful_gateway() as world:
        response = await world.send_body(b"x" * TWENTY_MB)

    assert_refused(response, 413, "request_too_large")


async def test_a_body_of_unknown_length_is_refused_when_it_gets_too_large(
    autojump_clock: MockClock,
) -> None:
    chunked = [("transfer-encoding", "chunked")]
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    async with careful_gateway() as world, world.client() as client:
        await client.send(http_request("POST", CHAT, headers=chunked))
        for _ in range(TWENTY_MB // 65536):
            await client.send(chunk)
        response = await client.read_response("POST")

    assert_refused(response, 413, "request_too_large")


async def test_a_question_about_routing_may_not_be_too_large_either(
    autojump_clock: MockClock,
) -> None:
    async with careful_gateway() as world:
        response = await world.send_body(b" " * 2**21, "/models/route")

    assert_refused(response, 413, "request_too_large")


async def test_the_limit_itself_is_not_too_large(autojump_clock: MockClock) -> None:
    body = json.dumps(chat("m")).encode()
    config = fleet({"m": {}}, performance={"max_body_bytes": len(body)})
    async with running_gateway(config) as world:
        fits = await world.send_body(body)
        over = await world.send_body(body + b" ")

    assert fits.status == 200
    assert_refused(over, 413, "request_too_large")


async def test_a_body_that_does_not_arrive_is_not_waited_for_for_ever(
    autojump_clock: MockClock,
) -> None:
    async with careful_gateway() as world, world.client() as client:
        began = trio.current_time()
        await client.send(http_request("POST", CHAT, chat("m"))[:-5])
        response = await client.read_response("POST")
        took = trio.current_time() - began

    assert response.status == 408
    assert took == 60
    [line] = world.access_log
    assert (line["status"], line["outcome"], line["code"]) == (
        408, "invalid_request", "bad_http_request",
    )  # fmt: skip


async def test_every_answer_has_a_log_line_but_those_to_probes(autojump_clock: MockClock) -> None:
    paths = ("/v1/models", "/v1/models/nope", "/nowhere", "/health", "/metrics", "/readyz")
    async with careful_gateway() as world:
        for path in paths:
            await world.get(path, [("x-request-id", f"to{path}")])

    lines = [(line["request_id"], line["route"], line["status"]) for line in world.access_log]
    assert lines == [
        ("to/v1/models", "/v1/models", 200),
        ("to/v1/models/nope", "/v1/models/nope", 404),
        ("to/nowhere", "/nowhere", 404),
    ]


# --- headers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/jsonp",
        "",
    ],
)
async def test_another_content_type_is_refused(autojump_clock: MockClock, value: str) -> None:
    async with careful_gateway() as world:
        response = await world.ask("m", [("content-type", value)])

    assert_refused(response, 415, "unsupported_media_type", "content-type")


@pytest.mark.parametrize("value", ["application/json", 'Application/JSON; charset="UTF-8"', None])
async def test_json_by_any_name_is_taken(autojump_clock: MockClock, value: str | None) -> None:
    body = json.dumps(chat("m")).encode()
    async with running_gateway(fleet({"m": {}})) as world:
        response = await world.send_body(body, headers=[("content-type", value)] if value else [])

    assert response.status == 200


async def test_a_compressed_body_is_never_inflated(autojump_clock: MockClock) -> None:
    body = gzip.compress(json.dumps(chat("m")).encode())
    async with careful_gateway() as world:
        response = await world.send_body(body, headers=[("content-encoding", "gzip")])

    assert_refused(response, 415, "unsupported_media_type", "content-encoding")


@pytest.mark.parametrize("value", ["soon", "", "0", "-1", "nan", "inf", "1e999", "1,2", "5s"])
async def test_a_time_that_is_none_is_refused(autojump_clock: MockClock, value: str) -> None:
    async with careful_gateway() as world:
        response = await world.ask("m", [("x-citadel-timeout", value)])

    error = assert_refused(response, 400, "invalid_request", "x-citadel-timeout")
    assert "x-citadel-timeout" in error["message"]


@pytest.mark.parametrize("sent", ["a b", "x" * 200, "\u00e9"])
async def test_a_request_id_that_is_not_sane_is_replaced(
    autojump_clock: MockClock, sent: str
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        response = await world.ask("m", [("x-request-id", sent)])

    (post,) = world.posts
    assert response.header("x-request-id") == post.request_id != sent
    assert len(post.request_id) == 32


# --- keys ------------------------------------------------------------------------------------


def keyed(**sections: Any) -> dict[str, Any]:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    return {"security": {"api_keys": [{"id": "a", "sha256": digest}], **sections}}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer  {KEY}")],
        [("authorization", f"Bearer {KEY},{KEY}")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", f"Bearer {KEY[:-1]}")],
        [("authorization", f"Basic {KEY}")],
        [("authorization", KEY)],
        [("authorization", "Bearer " + "x" * 600)],
        [("authorization", "Bearer \u00e9")],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
        [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")],
        [("x-api-key", KEY)],
    ],
)
async def test_without_one_good_key_nothing_is_done(
    autojump_clock: MockClock, headers: Headers
) -> None:
    async with careful_gateway(**keyed()) as world:
        asked = await world.ask("m", headers)
        listed = await world.get("/v1/models", headers)
        status = await world.get("/models/status", headers)
        healthy = await world.get("/health", headers)

    for response in (asked, listed, status):
        error = assert_refused(response, 401, "invalid_api_key")
        assert error["type"] == "invalid_request_error"
        assert response.header("www-authenticate") == "Bearer"
        assert KEY not in error["message"]
    assert healthy.status == 200
    assert KEY not in json.dumps(world.log.lines)


async def test_a_bad_key_is_refused_before_the_body_is_read(autojump_clock: MockClock) -> None:
    head = http_request("POST", CHAT, headers=[("content-length", "1000")])
    async with careful_gateway(**keyed()) as world, world.client() as client:
        await client.send(head)
        response = await client.read_response("POST")

    assert_refused(response, 401, "invalid_api_key")


async def test_a_good_key_is_good(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}}, **keyed())) as world:
        response = await world.ask("m", [("authorization", f"Bearer {KEY}")])

    assert response.status == 200
    assert [line["key_id"] for line in world.access_log] == ["a"]


async def test_over_its_limit_a_caller_is_told_exactly_when_to_come_again(
    autojump_clock: MockClock,
) -> None:
    limits = {"rate_limiting_enabled": True, "rate_limit_rps": 2, "rate_limit_burst": 3}
    async with running_gateway(fleet({"m": {}}, performance=limits)) as world:
        answers = [await world.ask("m") for _ in range(4)]
        refusal = answers[-1]
        wait = int(refusal.header("retry-after-ms") or 0) / 1000
        await trio.sleep(wait)
        again = await world.ask("m")
        too_soon = await world.ask("m")
        page = await world.metrics()

    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert [answer.header("x-ratelimit-remaining-requests") for answer in answers] == list("2100")
    assert answers[0].header("x-ratelimit-limit-requests") == "3"
    assert answers[0].header("x-ratelimit-reset-requests") == "500ms"
    error = assert_refused(refusal, 429, "rate_limit_exceeded")
    assert error["type"] == "requests"
    assert (wait, refusal.header("retry-after")) == (0.5, "1")
    assert (again.status, too_soon.status) == (200, 429)
    assert page["citadel_gateway_limiter_rejections_total", frozenset({("limit", "global")})] == 2


# --- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/nothing",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/V1/chat/completions",
        "/v2/chat/completions",
        "/pause",
        "/update_weights",
        "/flush_cache",
        "/slots",
        "/v1/load_lora_adapter",
        "/../etc/passwd",
        "/docs/../pyproject.toml",
        "/v1/chat/%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_there_is_nothing_elsewhere(
    autojump_clock: MockClock, method: str, path: str
) -> None:
    async with careful_gateway() as world:
        response = await world.send(method, path, chat("m") if method == "POST" else None)

    assert_refused(response, 404, "not_found")
    assert response.header("x-request-id")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, {"POST"}),
        ("PUT", CHAT, {"POST"}),
        ("DELETE", "/v1/embeddings", {"POST"}),
        ("OPTIONS", "/v1/completions", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("DELETE", "/v1/models/m", {"GET", "HEAD"}),
        ("GET", "/models/route", {"POST"}),
    ],
)
async def test_another_method_is_not_allowed(
    autojump_clock: MockClock, method: str, path: str, allowed: set[str]
) -> None:
    async with careful_gateway() as world:
        response = await world.send(method, path)

    error = assert_refused(response, 405, "method_not_allowed")
    assert set((response.header("allow") or "").split(", ")) == allowed
    assert method in error["message"]
    assert response.header("x-request-id")


# --- other origins ---------------------------------------------------------------------------


def preflight(origin: str) -> Headers:
    return [("origin", origin), ("access-control-request-method", "POST")]


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/health"])
async def test_a_page_that_may_call_is_told_so_without_a_key(
    autojump_clock: MockClock, path: str
) -> None:
    cors = {"allow_origins": [ORIGIN]}
    async with careful_gateway(**keyed(cors=cors)) as world:
        response = await world.send("OPTIONS", path, headers=preflight(ORIGIN))

    assert response.status == 204
    assert response.header("access-control-allow-origin") == ORIGIN
    assert "POST" in (response.header("access-control-allow-methods") or "")
    assert "authorization" in (response.header("access-control-allow-headers") or "")
    assert response.header("vary") == "origin"
    assert response.header("access-control-allow-credentials") is None


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        f"{ORIGIN}.evil.example",
        f"https://x.{ORIGIN.removeprefix('https://')}",
        ORIGIN.replace("https", "http"),
        f"{ORIGIN}:8443",
        ORIGIN.upper(),
    ],
)
async def test_another_page_is_told_nothing(autojump_clock: MockClock, origin: str) -> None:
    cors = {"cors": {"allow_origins": [ORIGIN]}}
    async with careful_gateway(security=cors) as world:
        asked = await world.send("OPTIONS", CHAT, headers=preflight(origin))
        read = await world.get("/v1/models", [("origin", origin)])
        wrong = await world.ask("gpt-7", [("origin", origin)])

    for response in (asked, read, wrong):
        found = [name for name, _ in response.headers if name.startswith("access-control")]
        assert found == []
        assert response.header("vary") == "origin"


async def test_a_page_that_may_call_can_read_answers_and_errors(autojump_clock: MockClock) -> None:
    cors = {"cors": {"allow_origins": [ORIGIN]}}
    config = fleet({"m": {}}, security=cors)
    headers = [("origin", ORIGIN)]
    async with running_gateway(config) as world:
        answers = [
            await world.ask("m", headers),
            await world.ask("m", headers, stream=True),
            await world.ask("gpt-7", headers),
            await world.get("/v1/models", headers),
            await world.get("/nothing", headers),
            await world.send("GET", CHAT, None, headers),
        ]

    assert {answer.header("access-control-allow-origin") for answer in answers} == {ORIGIN}
    exposed = answers[0].header("access-control-expose-headers") or ""
    assert {"x-request-id", "retry-after", "x-citadel-model"} <= set(exposed.split(", "))


async def test_without_cors_nobody_is_told_anything(autojump_clock: MockClock) -> None:
    async with careful_gateway() as world:
        response = await world.send("OPTIONS", CHAT, headers=preflight(ORIGIN))

    assert [name for name, _ in response.headers if name.startswith("access-control")] == []


# --- after all that --------------------------------------------------------------------------


async def test_every_refusal_has_one_line_and_one_count(autojump_clock: MockClock) -> None:
    async with careful_gateway() as world:
        await world.send_body(b"{")
        await world.ask("gpt-7")
        await world.ask("m", [("x-citadel-timeout", "0")])
        await world.ask("m", [("content-type", "text/plain")])
        page = await world.metrics_page()

    outcomes = [line["outcome"] for line in world.access_log]
    assert outcomes == ["invalid_request", "unknown_model", "invalid_request", "invalid_request"]
    labels = 'endpoint="none",model="none",outcome="invalid_request"'
    assert f"citadel_gateway_requests_total{{{labels}}} 3.0" in page


async def test_a_connection_survives_a_refusal(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world, world.client() as client:
        wrong = await client.request("POST", CHAT, {"model": "m", "messages": []})
        right = await client.request("POST", CHAT, chat("m"))

    assert (wrong.status, right.status) == (400, 200)


@pytest.mark.parametrize(
    ("data", "status"), [(b"GARBAGE\r\n\r\n", 400), (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505)]
)
async def test_what_is_no_request_is_answered_logged_and_counted(data: bytes, status: int) -> None:
    log = CapturedLog()
    config = {
        "service": {"host": "127.0.0.1", "port": 0},
        "monitoring": {"prometheus_port": None},
        "models": {"m": {"endpoint": "http://127.0.0.1:9"}},
    }
    service = UnifiedAPIGatewayService(parse(config), log=log)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(partial(service.run, handle_signals=False))
            async with await RawClient.connect(address.port) as client:
                await client.send(data)
                response = await client.read_response()
            page = (await service.metrics.render()).decode()
            nursery.cancel_scope.cancel()

    (line,) = [line for line in log.lines if line["event"] == "request"]
    assert response.status == line["status"] == status
    assert (line["outcome"], line["client"]) == ("invalid_request", "127.0.0.1")
    assert (
        total(parse_metrics(page), "citadel_gateway_requests_total", outcome="invalid_request") == 1
    )
