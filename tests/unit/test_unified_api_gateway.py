"""The facade of the seed, end to end: its import paths, its keywords, its routes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.config.loader import ConfigError
from hxp_enterprise_llm.monitoring.health import HealthChecker
from hxp_enterprise_llm.orchestration.gateway_orchestrator import GatewayOrchestrator
from hxp_enterprise_llm.schemas.configuration.gateway_schemas import GatewayConfigSchema
from hxp_enterprise_llm.services.circuit_breaker import CircuitBreaker
from hxp_enterprise_llm.services.gateway.unified_api_gateway.config import UnifiedAPIGatewayConfig
from hxp_enterprise_llm.services.gateway.unified_api_gateway.service import UnifiedAPIGatewayService
from hxp_enterprise_llm.services.load_balancer import LoadBalancer
from tests.support.gateway import CHAT, chat, endpoint, events, fleet, gather, running_gateway
from tests.support.raw_client import http_request
from tests.support.scripted_engine import (
    LedgerEntry,
    Script,
    answered,
    close,
    send,
    status,
    stream_chat,
    whole_chat,
)

SEED = ["mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini"]
FLEET = fleet({name: {} for name in SEED})


def seed_config(**changes: Any) -> UnifiedAPIGatewayConfig:
    """The seed's own call, keyword for keyword."""
    keywords: dict[str, Any] = {
        "port": 8000,
        "host": "0.0.0.0",
        "workers": 4,
        "memory_gb": 2,
        "cpu_cores": 4,
        "default_model": "mixtral-8x7b",
        "model_routing_enabled": True,
        "intelligent_routing": True,
        "cost_optimization_enabled": True,
        "load_balancer_algorithm": "round_robin",
        "health_check_interval": 30,
        "circuit_breaker_threshold": 5,
        "circuit_breaker_timeout": 60,
        "request_timeout_seconds": 30,
        "max_concurrent_requests": 100,
        "rate_limiting_enabled": True,
        "rate_limit_rps": 50,
    }
    return UnifiedAPIGatewayConfig(**keywords | changes)


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status":"ok"}'
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Say nothing."""


@contextmanager
def healthy_engine() -> Iterator[str]:
    """The URL of an engine on a real socket, for callers that bring their own event loop."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Healthy)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def four_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The seed's four models, where its environment variables say."""
    with ExitStack() as stack:
        for name in ("MIXTRAL_8X7B", "HERMES_2", "OPENCHAT_3_5", "PHI_3_MINI"):
            monkeypatch.setenv(f"{name}_ENDPOINT", stack.enter_context(healthy_engine()))
        yield


@pytest.fixture
def dead_url() -> str:
    with healthy_engine() as url:
        return url


# --- without an event loop -------------------------------------------------------------------


def test_every_import_path_of_the_seed_leads_to_the_real_thing() -> None:
    found = [
        HealthChecker,
        GatewayOrchestrator,
        GatewayConfigSchema,
        CircuitBreaker,
        UnifiedAPIGatewayConfig,
        UnifiedAPIGatewayService,
        LoadBalancer,
    ]

    assert {cls.__module__.partition(".")[0] for cls in found} == {"citadel_gateway"}


def test_the_seeds_keywords_make_the_seeds_configuration() -> None:
    schema = seed_config().schema()

    assert isinstance(schema, GatewayConfigSchema)
    assert list(schema.models) == SEED
    assert [model.max_concurrent for model in schema.models.values()] == [10, 20, 50, 100]
    assert attrs.asdict(schema.load_balancer, filter=lambda a, _: "breaker_t" in a.name) == {
        "circuit_breaker_threshold": 5,
        "circuit_breaker_timeout": 60.0,
    }
    assert (schema.service.port, schema.monitoring.prometheus_port) == (8000, 9090)


def test_a_wrong_keyword_is_refused_where_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"load_balancer\.algorithm.*round_robin"):
        seed_config(load_balancer_algorithm="round_robbin")


@pytest.mark.usefixtures("four_engines")
def test_get_health_status_outside_an_event_loop_reports_all_four_models() -> None:
    gateway = UnifiedAPIGatewayService(seed_config())

    report = gateway.get_health_status()

    assert datetime.fromisoformat(report.pop("timestamp")).tzinfo is not None
    assert report == {"status": "healthy", "gateway": "unified-api-gateway", "models": SEED}


@pytest.mark.usefixtures("four_engines")
def test_get_health_status_may_be_called_again_and_again() -> None:
    gateway = UnifiedAPIGatewayService(seed_config())

    assert [gateway.get_health_status()["status"] for _ in range(3)] == ["healthy"] * 3


@pytest.mark.usefixtures("four_engines")
def test_a_gateway_that_was_asked_for_its_health_can_still_be_run() -> None:
    gateway = UnifiedAPIGatewayService(seed_config())
    gateway.get_health_status()

    async def run() -> tuple[dict[str, Any], list[str]]:
        async with gateway.open():
            return gateway.get_health_status(), gateway.balancer.get_available_models()

    report, available = trio.run(run)
    assert (report["status"], available) == ("healthy", SEED)


@pytest.mark.usefixtures("four_engines")
def test_the_load_balancer_alone_lists_all_four_models() -> None:
    balancer = LoadBalancer(seed_config())

    assert balancer.get_available_models() == SEED
    assert balancer.get_available_models() == SEED


def test_health_is_degraded_when_a_model_cannot_be_reached(dead_url: str) -> None:
    with healthy_engine() as url:
        models = {"mixtral-8x7b": {"endpoint": url}, "hermes-2": {"endpoint": dead_url}}
        config = seed_config(models=models)

        report = UnifiedAPIGatewayService(config).get_health_status()
        available = LoadBalancer(config).get_available_models()

    assert (report["status"], report["models"]) == ("degraded", ["mixtral-8x7b"])
    assert available == ["mixtral-8x7b"]


def test_health_is_unhealthy_when_no_model_can_be_reached(dead_url: str) -> None:
    gateway = UnifiedAPIGatewayService(seed_config(models={"mixtral-8x7b": {"endpoint": dead_url}}))

    report = gateway.get_health_status()

    assert (report["status"], report["models"]) == ("unhealthy", [])


# --- reports ---------------------------------------------------------------------------------


async def test_health_has_the_seeds_shape(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        response = await world.get("/health")
        inside = world.service.get_health_status()

    report = response.json()
    assert response.status == 200
    assert list(report) == ["status", "gateway", "models", "timestamp"]
    assert report["status"] == "healthy"
    assert report["models"] == inside["models"] == SEED


async def test_health_is_503_when_no_model_is_left(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.endpoint("m").health.healthy = False

        health = await world.get("/health")
        ready = await world.get("/readyz")
        alive = await world.get("/livez")

    assert (health.status, health.json()["status"]) == (503, "unhealthy")
    assert (ready.status, alive.status) == (503, 200)


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/health/liveliness"])
async def test_it_lives_under_every_usual_name(autojump_clock: MockClock, path: str) -> None:
    async with running_gateway(FLEET) as world:
        response = await world.get(path)

    assert (response.status, response.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("path", ["/readyz", "/health/readiness"])
async def test_it_is_ready_until_it_drains(autojump_clock: MockClock, path: str) -> None:
    async with running_gateway(FLEET) as world:
        before = await world.get(path)
        world.service.draining.set()
        after = await world.get(path)

    assert (before.status, after.status) == (200, 503)


async def test_models_are_listed_with_their_capabilities(autojump_clock: MockClock) -> None:
    config = fleet({"a": {"context_window": 4096, "aliases": ["gpt-4"]}, "b": {}})
    async with running_gateway(config) as world:
        response = await world.get("/v1/models")

    cards = response.json()["data"]
    assert response.json()["object"] == "list"
    assert [card["id"] for card in cards] == ["a", "b"]
    assert [card["object"] for card in cards] == ["model", "model"]
    assert cards[0]["capabilities"] == ["chat", "completions", "embeddings"]
    assert (cards[0]["context_window"], cards[0]["aliases"]) == (4096, ["gpt-4"])
    assert isinstance(cards[0]["created"], int)


@pytest.mark.parametrize("name", ["a", "gpt-4", "org/model"])
async def test_one_model_is_shown_by_its_name_or_alias(
    autojump_clock: MockClock, name: str
) -> None:
    config = fleet({"a": {"aliases": ["gpt-4", "org/model"]}})
    async with running_gateway(config) as world:
        response = await world.get(f"/v1/models/{name}")

    assert (response.status, response.json()["id"]) == (200, "a")


async def test_an_unknown_model_is_not_shown(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        response = await world.get("/v1/models/gpt-7")

    error = response.json()["error"]
    assert response.status == 404
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert all(name in error["message"] for name in SEED)


async def test_the_status_of_every_model_and_endpoint_is_told(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        world.endpoint("b").health.healthy = False
        report = (await world.get("/models/status")).json()

    model = report["models"]["m"]
    assert report["status"] == "healthy"
    assert model["status"] == "available"
    assert [e["url"] for e in model["endpoints"]] == [endpoint("a"), endpoint("b")]
    assert [e["healthy"] for e in model["endpoints"]] == [True, False]
    assert [e["breaker"] for e in model["endpoints"]] == ["closed", "closed"]
    assert report["limits"]["max_concurrent_requests"] == 100


async def test_metrics_are_there_for_whoever_greps_for_gateway(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        await world.ask("m")
        response = await world.get("/metrics")

    assert response.status == 200
    assert (response.header("content-type") or "").startswith("text/plain")
    labels = f'endpoint="{endpoint("m")}",model="m",outcome="ok"'
    assert f"citadel_gateway_requests_total{{{labels}}} 1.0" in response.body.decode()


async def test_configured_paths_replace_the_usual_ones(autojump_clock: MockClock) -> None:
    monitoring = {"health_check_endpoint": "/up", "metrics_endpoint": "/numbers"}
    async with running_gateway(fleet({"m": {}}, monitoring=monitoring)) as world:
        statuses = [(await world.get(path)).status for path in ("/up", "/numbers", "/health")]

    assert statuses == [200, 200, 404]


# --- inference -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_answered_by_the_model_asked_for(
    autojump_clock: MockClock, stream: bool
) -> None:
    async with running_gateway(FLEET) as world:
        response = await world.ask("hermes-2", [("x-request-id", "r1")], stream=stream)

    assert (response.status, response.complete) == (200, True)
    assert [len(engine.posts) for engine in world.engines.values()] == [0, 1, 0, 0]
    assert response.header("x-request-id") == "r1"
    assert response.header("x-citadel-model") == "hermes-2"
    assert response.header("x-citadel-backend") == endpoint("hermes-2")
    assert response.header("x-citadel-attempts") == "1"
    assert response.header("x-citadel-route-reason") == "requested"
    (post,) = world.engines["hermes-2"].posts
    assert post.headers["x-request-id"] == "r1"


async def test_a_stream_arrives_event_by_event(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = stream_chat(["one ", "two ", "three"], gap=1.0)
        arrivals = []
        async with world.client() as client:
            await client.send(http_request("POST", CHAT, chat("m", stream=True)))
            async for _ in (reader := client.read_events()):
                arrivals.append(autojump_clock.current_time())

    began = arrivals[0]
    assert [at - began for at in arrivals] == [0, 1, 2, 2, 2]
    assert reader.response.complete
    assert events(reader.response)[-1] == "[DONE]"
    assert reader.response.header("content-type") == "text/event-stream; charset=utf-8"
    assert reader.response.header("x-accel-buffering") == "no"


async def test_the_bytes_of_a_stream_are_the_engines(autojump_clock: MockClock) -> None:
    odd = b'data:{"choices": [ {"index":0,"delta":{"content":"\\u00e9"},"extra":1e2}]}\n\n'
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    async with running_gateway(fleet({"m": {}})) as world:
        stream = send(head + odd + b": a comment\n\n" + end)
        world.engines["m"].default = Script([stream, answered(), close()])
        response = await world.ask("m", stream=True)

    assert response.complete
    assert response.body == odd + b": a comment\n\n" + end + b"data: [DONE]\n\n"


async def test_completions_whole_and_streamed(autojump_clock: MockClock) -> None:
    answer = b'{"object":"text_completion","choices":[{"index":0,"text":"ok"}]}'
    piece = b'data: {"choices":[{"index":0,"text":"ok","finish_reason":"length"}]}\n\n'
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].scripts.append(status(200, answer))
        world.engines["m"].scripts.append(
            status(200, piece + b"data: [DONE]\n\n", [("content-type", "text/event-stream")])
        )
        whole = await world.send("POST", "/v1/completions", {"model": "m", "prompt": "hi"})
        streamed = await world.send(
            "POST", "/v1/completions", {"model": "m", "prompt": "hi", "stream": True}
        )

    assert whole.body == answer
    assert streamed.body == piece + b"data: [DONE]\n\n"
    assert {post.path for post in world.posts} == {"/v1/completions"}


async def test_embeddings(autojump_clock: MockClock) -> None:
    answer = b'{"object":"list","data":[{"index":0,"embedding":[0.5]}],"usage":{"prompt_tokens":2}}'
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = status(200, answer)
        response = await world.send("POST", "/v1/embeddings", {"model": "m", "input": ["hi"]})

    assert (response.status, response.body) == (200, answer)
    assert [post.path for post in world.posts] == ["/v1/embeddings"]


async def test_what_the_gateway_does_not_know_reaches_the_engine_byte_for_byte(
    autojump_clock: MockClock,
) -> None:
    body = (
        '{ "model" :"m", "messages":[{"role":"user","content":"\\u00e9 \U0001f600 \\u2028"}],\n'
        '  "top_k":40, "temperature":1.0e0, "big":9007199254740993, "guided_json":{"z":1,"a":[]},'
        '"n":1}'
    ).encode()
    async with running_gateway(fleet({"m": {}})) as world:
        response = await world.send_body(body)

    assert response.status == 200
    assert [post.body for post in world.posts] == [body]


async def test_only_the_models_name_is_changed_in_a_request(autojump_clock: MockClock) -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}], "model":"gpt-4", "x":1.50}'
    config = fleet({"m": {"aliases": ["gpt-4"], "upstream_model": "org/weights"}})
    async with running_gateway(config) as world:
        response = await world.send_body(body)

    assert response.header("x-citadel-model") == "m"
    assert response.header("x-citadel-route-reason") == "alias"
    assert [post.body for post in world.posts] == [body.replace(b"gpt-4", b"org/weights")]


async def test_usage_is_asked_of_the_engine_and_kept_from_clients_that_did_not(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        plain = await world.ask("m", stream=True)
        asked = await world.ask("m", stream=True, stream_options={"include_usage": True})

    usages = [post.json["stream_options"] for post in world.posts]
    assert usages == [{"include_usage": True}] * 2
    assert b'"usage"' not in plain.body
    assert b'"usage"' in asked.body


async def test_an_engine_that_does_not_know_stream_options_is_asked_without_them(
    autojump_clock: MockClock,
) -> None:
    def picky(entry: LedgerEntry) -> Script:
        if "stream_options" in entry.json:
            return status(400, b'{"error":{"message":"unknown field stream_options"}}')
        return stream_chat(["ok"])

    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = picky
        first = await world.ask("m", stream=True)
        second = await world.ask("m", stream=True)

    assert (first.status, second.status) == (200, 200)
    assert len(world.posts) == 3


async def test_the_endpoints_key_is_sent_and_the_clients_is_not(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"api_key": "engine-key"}})) as world:
        await world.ask("m", [("authorization", "Bearer mine"), ("cookie", "a=b")])

    (post,) = world.posts
    assert post.headers["authorization"] == "Bearer engine-key"
    assert "cookie" not in post.headers


# --- which model answers ---------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"model": ""}, {"model": "auto"}, {"model": None}])
async def test_without_a_model_all_of_them_take_turns(
    autojump_clock: MockClock, asked: dict[str, Any]
) -> None:
    config = fleet({name: {} for name in SEED})
    async with running_gateway(config) as world:
        answers = [await world.send("POST", CHAT, {**chat(), **asked}) for _ in range(8)]

    assert [len(engine.posts) for engine in world.engines.values()] == [2, 2, 2, 2]
    assert {post.json["model"] for post in world.posts} == set(SEED)
    assert answers[0].header("x-citadel-route-reason") == "auto:round_robin"


async def test_the_seeds_ten_curls_are_spread_over_the_models(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        for engine in world.engines.values():
            engine.default = whole_chat("ok")
        answers = await gather(*[partial(world.ask, max_tokens=20) for _ in range(10)])

    assert [answer.status for answer in answers] == [200] * 10
    assert all(engine.posts for engine in world.engines.values())


@pytest.mark.parametrize("asked", [None, "auto"])
async def test_without_intelligent_routing_the_default_model_answers(
    autojump_clock: MockClock, asked: str | None
) -> None:
    routing = {"intelligent_routing": False, "default_model": "hermes-2"}
    async with running_gateway({**FLEET, "gateway": routing}) as world:
        response = await world.ask(asked)
        explicit = await world.ask("phi-3-mini")

    assert response.header("x-citadel-model") == "hermes-2"
    assert response.header("x-citadel-route-reason") == "default_model"
    assert explicit.header("x-citadel-model") == "phi-3-mini"


@pytest.mark.parametrize("asked", [None, "auto", "phi-3-mini", "gpt-7"])
async def test_with_routing_off_everything_goes_to_the_default_model(
    autojump_clock: MockClock, asked: str | None
) -> None:
    routing = {"model_routing_enabled": False, "default_model": "hermes-2"}
    async with running_gateway({**FLEET, "gateway": routing}) as world:
        response = await world.ask(asked)

    assert response.header("x-citadel-model") == "hermes-2"
    assert response.header("x-citadel-route-reason") == "routing_off"
    assert [post.json["model"] for post in world.posts] == ["hermes-2"]


async def test_an_unknown_model_is_refused(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        response = await world.ask("gpt-7")

    error = response.json()["error"]
    assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert world.posts == []


async def test_routing_headers_can_be_kept_from_clients(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}}, gateway={"routing_headers": False})) as world:
        response = await world.ask("m")

    assert [name for name, _ in response.headers if name.startswith("x-citadel")] == []
    assert response.header("x-request-id")


async def test_one_connection_carries_many_requests(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world, world.client() as client:
        for stream in (False, True, False):
            response = await client.request("POST", CHAT, chat("m", stream=stream))
            assert (response.status, response.complete) == (200, True)
        assert (await client.request("GET", "/health")).status == 200

    assert world.engines["m"].connections == 1
