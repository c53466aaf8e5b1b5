from __future__ import annotations

from collections.abc import Callable, Coroutine

import attrs
import httpx
import orjson
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.io.health_monitoring import HealthChecker, Probe, ask, check_all
from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.health_tracker import HealthTracker

URL = "http://engine:8000/v1"
Answer = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


@attrs.define(eq=False)
class Engine:
    """Answers with the status that it is set to, and remembers what was asked, and when."""

    status: int = 200
    delay: float = 0
    asked: list[tuple[float, str]] = attrs.field(factory=list)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((trio.current_time(), request.url.path))
        await trio.sleep(self.delay)
        if not self.status:
            raise httpx.ConnectError("connection refused")
        return httpx.Response(self.status, stream=httpx.ByteStream(b"{}"))

    def client(self, answer: Answer | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer or self.answer))


@attrs.define(eq=False)
class Watch:
    checker: HealthChecker
    flips: list[tuple[float, bool]]

    @property
    def health(self) -> HealthTracker:
        return self.checker.endpoint.health


def watching(engine: Engine, *, every: float = 30, within: float = 2) -> Watch:
    endpoint = Endpoint(
        model="m",
        url=URL,
        weight=1,
        max_concurrent=1,
        cost=None,
        breaker=CircuitBreaker(BreakerPolicy(), lambda: 0.5),
        health=HealthTracker(rise=1, fall=3),
    )
    flips: list[tuple[float, bool]] = []
    checker = HealthChecker(
        endpoint=endpoint,
        probe=Probe.of(URL, "vllm", None),
        client=engine.client(),
        every=every,
        within=within,
        on_flip=lambda e: flips.append((trio.current_time(), e.health.healthy)),
        jitter=lambda: 0.5,
    )
    return Watch(checker, flips)


@pytest.mark.parametrize(
    ("status", "complaint"),
    [
        (200, None),
        (204, None),
        (401, "it does not accept the gateway's key (status 401)"),
        (403, "it does not accept the gateway's key (status 403)"),
        (503, "it is loading, or overloaded (status 503)"),
        (500, "status 500"),
        (302, "status 302"),
        (0, "connection refused"),
    ],
)
async def test_what_an_answer_says_about_an_endpoint(status: int, complaint: str | None) -> None:
    engine = Engine(status)

    assert await ask(engine.client(), Probe.of(URL, "vllm", None), 1) == complaint


@pytest.mark.parametrize(
    ("engine", "paths"),
    [
        ("auto", ["/health", "/v1/models"]),
        ("vllm", ["/health"]),
        ("llamacpp", ["/health"]),
        ("ollama", ["/api/version"]),
        ("openai", ["/v1/models"]),
    ],
)
async def test_each_engine_is_asked_in_its_own_way(engine: str, paths: list[str]) -> None:
    mute = Engine(404)

    # It speaks HTTP, and has no health route to ask.
    assert await ask(mute.client(), Probe.of(URL, engine, None), 1) is None
    assert [path for _, path in mute.asked] == paths


async def test_the_second_route_is_asked_only_when_there_is_no_first() -> None:
    engine = Engine(503)
    await ask(engine.client(), Probe.of(URL, "auto", None), 1)

    assert [path for _, path in engine.asked] == ["/health"]


async def test_the_key_is_shown() -> None:
    shown = []

    async def answer(request: httpx.Request) -> httpx.Response:
        shown.append(request.headers.get("authorization"))
        return httpx.Response(200, stream=httpx.ByteStream(b"{}"))

    await ask(Engine().client(answer), Probe.of(URL, "vllm", "sk-engine"), 1)

    assert shown == ["Bearer sk-engine"]


async def test_a_report_without_a_known_length_is_not_read(autojump_clock: object) -> None:
    class Endless(httpx.AsyncByteStream):
        pieces = 0

        def __aiter__(self) -> Endless:
            return self

        async def __anext__(self) -> bytes:
            self.pieces += 1
            return b"x" * 1024

    endless = Endless()

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=endless)

    assert await ask(Engine().client(answer), Probe.of(URL, "vllm", None), 1) is None
    assert endless.pieces == 0


async def test_no_answer_in_time_is_a_complaint(autojump_clock: object) -> None:
    engine = Engine(delay=10)

    assert await ask(engine.client(), Probe.of(URL, "auto", None), 2) == "no answer within 2 s"
    assert trio.current_time() == 2


async def test_an_outage_is_noticed_after_three_probes_and_its_end_after_one(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    engine = Engine()
    watch = watching(engine)
    await watch.checker.check()
    nursery.start_soon(watch.checker.watch)
    await trio.sleep(1)
    engine.status = 0
    await trio.sleep(60)
    engine.status = 200
    await trio.sleep(60)

    # Every 30 s while all is well, every 5 s while there is doubt.
    assert watch.flips == [(0, True), (40, False), (65, True)]
    assert [at for at, _ in engine.asked] == [0, *range(30, 70, 5), 95]


async def test_a_suspect_endpoint_is_probed_now(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    engine = Engine()
    watch = watching(engine)
    await watch.checker.check()
    nursery.start_soon(watch.checker.watch)
    await trio.sleep(7)
    watch.checker.suspect()
    await trio.sleep(1)

    assert [at for at, _ in engine.asked] == [0, 7]


async def test_doubt_that_arises_during_a_probe_is_not_lost(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    engine = Engine(delay=1)
    watch = watching(engine)
    nursery.start_soon(watch.checker.watch)
    await trio.sleep(5.5)
    watch.checker.suspect()
    await trio.sleep(2)

    assert [at for at, _ in engine.asked] == [5, 6]


async def test_all_endpoints_are_probed_side_by_side(autojump_clock: object) -> None:
    watches = [watching(Engine(delay=1)) for _ in range(4)]
    await check_all([w.checker for w in watches], within=1.5)

    assert trio.current_time() == 1
    assert all(w.health.healthy for w in watches)


async def test_a_slow_endpoint_does_not_hold_up_the_start(autojump_clock: object) -> None:
    quick, slow = watching(Engine()), watching(Engine(delay=10), within=20)
    await check_all([slow.checker, quick.checker], within=1.5)

    assert trio.current_time() == 1.5
    assert (quick.health.healthy, slow.health.healthy) == (True, False)


# --- what it is ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Named(Engine):
    """Says what it is in its list of models, unless that is broken."""

    owner: str = "sglang"
    broken: bool = False
    server: str = "uvicorn"

    async def answer(self, request: httpx.Request) -> httpx.Response:
        answer = await Engine.answer(self, request)
        answer.headers["server"] = self.server
        if request.url.path != "/v1/models":
            return answer
        card = {"id": "m", "object": "model", "created": 1, "owned_by": self.owner}
        listing = {"data": [{**card, "root": "m", "max_model_len": 1}]}
        if self.broken:
            raise httpx.ReadError("cut")
        return httpx.Response(200, stream=httpx.ByteStream(orjson.dumps(listing)))

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.asked]


def unnamed(engine: Engine, configured: str = "auto") -> HealthChecker:
    checker = watching(engine).checker
    checker.probe = Probe.of(URL, configured, None)
    return checker


async def test_what_an_engine_is_is_asked_once(autojump_clock: MockClock) -> None:
    engine = Named()
    checker = unnamed(engine)
    for _ in range(3):
        await checker.check()

    assert engine.paths == ["/health", "/v1/models", "/health", "/health"]
    assert checker.endpoint.engine == "sglang"


async def test_nobody_asks_an_engine_that_is_named(autojump_clock: MockClock) -> None:
    engine = Named()
    checker = unnamed(engine, "vllm")
    await checker.check()

    assert engine.paths == ["/health"]
    assert checker.endpoint.engine is None


async def test_an_answer_that_says_nothing_is_enough_but_no_answer_is_not(
    autojump_clock: MockClock,
) -> None:
    engine, known = Named(owner="somebody", broken=True), []
    checker = unnamed(engine)
    for broken in (True, False, False, False):
        engine.broken = broken
        await checker.check()
        known.append(checker.endpoint.engine)

    assert engine.paths.count("/v1/models") == 2
    assert known == [None, "", "", ""]


async def test_llama_cpp_is_known_by_its_header(autojump_clock: MockClock) -> None:
    engine = Named(server="llama.cpp")
    checker = unnamed(engine)
    await checker.check()

    assert engine.paths == ["/health"]
    assert checker.endpoint.engine == "llamacpp"


async def test_an_engine_that_was_down_may_be_another_one(autojump_clock: MockClock) -> None:
    engine = Named()
    checker = unnamed(engine)
    known = []
    for status in (200, 0, 0, 0, 200):  # down after the third
        engine.status = status
        await checker.check()
        known.append(checker.endpoint.engine)
        engine.owner = "another"

    assert known == ["sglang", "sglang", "sglang", None, ""]


@pytest.mark.parametrize("how", ["a bad probe", "a request that could not reach it"])
async def test_after_a_doubt_it_is_asked_again(autojump_clock: MockClock, how: str) -> None:
    engine = Named()
    checker = unnamed(engine)
    await checker.check()
    if how == "a bad probe":
        engine.status = 0
        await checker.check()
        engine.status = 200
    else:
        checker.suspect()
    engine.owner = "another"
    await checker.check()

    assert checker.endpoint.engine == ""


async def test_a_list_of_models_that_does_not_come_holds_up_nothing(
    autojump_clock: MockClock,
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            await trio.sleep_forever()
        return httpx.Response(200, stream=httpx.ByteStream(b""))

    checker = unnamed(Engine())
    checker.client = Engine().client(answer)
    await checker.check()

    assert trio.current_time() == pytest.approx(2)
    assert checker.endpoint.health.healthy
    assert checker.endpoint.engine is None
