"""The books balance: what clients saw, what engines did, what is counted and what is logged."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import suppress
from functools import partial

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.support import scripted_engine as engines
from tests.support.gateway import (
    CHAT,
    World,
    chat,
    endpoint,
    fleet,
    gather,
    running_gateway,
    words,
)
from tests.support.ledger import ClientLedger, Metrics, total
from tests.support.raw_client import NoResponseError, RawResponse, http_request
from tests.support.scripted_engine import LedgerEntry, Script

PROMTOOL = shutil.which("promtool")
PROMPT = 3  # tokens that every engine says it has read
REQUESTS = 400
OUTCOMES = {
    "missing": "invalid_request",
    "model_not_found": "unknown_model",
    "rate_limit_exceeded": "rate_limited",
    "queue_full": "queue_full",
    "queue_timeout": "queue_timeout",
    "no_healthy_backend": "no_healthy_backend",
    "timeout_total": "timeout",
    "timeout_headers": "timeout",
    "timeout_first_token": "timeout",
    "upstream_overloaded": "upstream_rejected",
    "bad_top_k": "upstream_rejected",
    "upstream_500": "upstream_error",
    "upstream_connection_error": "upstream_error",
    "upstream_protocol_error": "upstream_error",
}
CONFIG = fleet(
    {
        "m": {"endpoints": [{"url": endpoint("a")}, {"url": endpoint("b")}], "max_concurrent": 6,
              "fallbacks": ["n"], "aliases": ["x"]},
        "n": {"endpoint": endpoint("c"), "max_concurrent": 8},
    },
    load_balancer={"queue_size": 15, "queue_timeout": 4},
    performance={
        "max_concurrent_requests": 16, "rate_limiting_enabled": True, "rate_limit_rps": 8,
        "rate_limit_burst": 120, "timeouts": {"headers": 5, "first_token": 6, "idle": 3},
    },
)  # fmt: skip


@attrs.define(eq=False)
class Run:
    """A crowd of clients that write down what they saw."""

    world: World
    seed: int
    ledger: ClientLedger = attrs.field(factory=ClientLedger)
    outcomes: dict[str, str] = attrs.field(factory=dict)
    completion: int = 0

    async def everybody(self) -> None:
        for engine in self.world.engines.values():
            engine.default = self.script
        await gather(*[partial(self.one, f"r{n}") for n in range(REQUESTS)])
        await trio.sleep(0.125)

    async def one(self, request_id: str) -> None:
        """Nobody leaves at the very moment of something else: who was first would be open."""
        rng = random.Random(f"{self.seed} {request_id}")
        stream, patience = rng.random() < 0.5, rng.choice([1000, 1000, 0.2, 1.2, 2.2])
        patience += rng.random() / 10
        model = rng.choice(["m", "m", "x", "n", "auto", None, "gpt-7"])
        data = chat(model, stream=stream)
        if rng.random() < 0.05:
            del data["messages"]
        await trio.sleep(rng.randrange(40) / 2)
        self.ledger.ask(request_id)
        async with self.world.client() as client:
            await client.send(http_request("POST", CHAT, data, [("x-request-id", request_id)]))
            reader = client.read_events()
            with trio.move_on_after(patience) as scope:
                async for _ in reader:
                    pass
            with suppress(NoResponseError):
                self.completion += count(reader.response)
            if scope.cancelled_caught:
                self.ledger.left(request_id)
                self.outcomes[request_id] = "client_closed"
            else:
                self.note(request_id, reader.response)

    def note(self, request_id: str, response: RawResponse) -> None:
        failed = response.status == 200 and not response.complete
        self.ledger.saw(request_id, response, failed=failed)
        if response.status != 200:
            self.outcomes[request_id] = OUTCOMES[response.json()["error"]["code"]]
        elif failed:
            self.outcomes[request_id] = "stream_broken"
        else:
            self.outcomes[request_id] = "ok"

    def script(self, entry: LedgerEntry) -> Script:
        """Mostly slow and good, sometimes bad; a good answer has a word for each token."""
        rng = random.Random(
            f"{self.seed} {entry.request_id} {entry.attempt} {entry.headers['host']}"
        )
        stream, draw = entry.json["stream"], rng.random()
        pause = rng.choice([0, 0.5, 1, 2])
        if draw < 0.12:
            return rng.choice(
                [
                    engines.status(500),
                    engines.status(429, b"", [("retry-after", "1")]),
                    engines.status(400, b'{"error":{"message":"no","code":"bad_top_k"}}'),
                    engines.html(),
                    Script([engines.hang()]),
                ]
            )
        if draw < 0.2 and stream:
            return rng.choice(
                [engines.cut_after(2), engines.error_event(1), engines.stall_after(3)]
            )
        if draw < 0.2:
            return engines.half_body()
        text = ["word "] * rng.randrange(1, 6)
        usage = (PROMPT, len(text))
        good = (
            engines.stream_chat(text, usage=usage, gap=pause)
            if stream
            else engines.whole_chat("".join(text), usage)
        )
        return Script([engines.sleep(pause), *good.steps])


def count(response: RawResponse) -> int:
    """Tokens that a client has got: each is one word."""
    if response.status != 200:
        return 0
    if (response.header("content-type") or "").startswith("text/event-stream"):
        return len(words(response).split())
    text: str = response.json()["choices"][0]["message"]["content"]
    return len(text.split())


async def run(world: World, seed: int) -> tuple[Run, Metrics, str]:
    crowd = Run(world, seed)
    await crowd.everybody()
    return crowd, await world.metrics(), await world.metrics_page()


def by(metrics: Metrics, name: str, label: str) -> Counter[str]:
    """The metric, summed up by one of its labels."""
    sums: Counter[str] = Counter()
    for (key, labels), value in metrics.items():
        if key == name:
            sums[dict(labels)[label]] += int(value)
    return +sums


@pytest.mark.parametrize("seed", range(2))
async def test_clients_engines_metrics_and_log_agree(autojump_clock: MockClock, seed: int) -> None:
    async with running_gateway(CONFIG, seed=seed) as world:
        crowd, metrics, _ = await run(world, seed)

    lines = {line["request_id"]: line for line in world.access_log}
    outcomes = Counter(crowd.outcomes.values())
    assert crowd.ledger.discrepancies(world.posts, attempts=3) == []
    assert len(world.access_log) == len(lines) == len(crowd.outcomes) == REQUESTS
    assert {key: line["outcome"] for key, line in lines.items()} == crowd.outcomes
    assert by(metrics, "citadel_gateway_requests_total", "outcome") == outcomes
    assert total(metrics, "citadel_gateway_cancellations_total") == outcomes["client_closed"]
    assert total(metrics, "citadel_gateway_request_duration_seconds_count") == REQUESTS
    rejected = total(metrics, "citadel_gateway_limiter_rejections_total")
    assert rejected == outcomes["rate_limited"]


@pytest.mark.parametrize("seed", range(2))
async def test_attempts_are_what_the_engines_were_asked(
    autojump_clock: MockClock, seed: int
) -> None:
    async with running_gateway(CONFIG, seed=seed) as world:
        _, metrics, _ = await run(world, seed)

    asked = {endpoint(host): len(engine.posts) for host, engine in world.engines.items()}
    runs = Counter(post.request_id for post in world.posts)
    results = by(metrics, "citadel_gateway_attempts_total", "result")
    assert by(metrics, "citadel_gateway_attempts_total", "endpoint") == asked
    assert {line["request_id"]: line["attempts"] for line in world.access_log} == {
        line["request_id"]: runs[line["request_id"]] for line in world.access_log
    }
    assert max(runs.values()) > 1
    timeouts = sum(n for result, n in results.items() if result.startswith("timeout_"))
    abandoned = sum(engine.abandoned for engine in world.engines.values())
    assert results["cancelled"] + timeouts == abandoned


@pytest.mark.parametrize("seed", range(2))
async def test_tokens_are_the_engines_truth(autojump_clock: MockClock, seed: int) -> None:
    async with running_gateway(CONFIG, seed=seed) as world:
        crowd, metrics, _ = await run(world, seed)

    answered = Counter(crowd.outcomes.values())["ok"]
    logged = Counter[str]()
    for line in world.access_log:
        logged["prompt"] += line.get("prompt_tokens", 0)
        logged["completion"] += line.get("completion_tokens", 0)
    counted = by(metrics, "citadel_gateway_tokens_total", "kind")
    assert counted == logged == {"prompt": PROMPT * answered, "completion": crowd.completion}


@pytest.mark.parametrize("seed", range(2))
async def test_levels_go_back_to_nothing(autojump_clock: MockClock, seed: int) -> None:
    async with running_gateway(CONFIG, seed=seed) as world:
        await run(world, seed)
        await trio.sleep(10)
        metrics = await world.metrics()
        idle = world.service.pool.idle_count  # a probe may have been just now
        still_open = sum(engine.open_connections for engine in world.engines.values())

    assert total(metrics, "citadel_gateway_in_flight") == 0
    assert total(metrics, "citadel_gateway_in_flight_requests") == 0
    assert total(metrics, "citadel_gateway_queue_depth") == 0
    assert total(metrics, "citadel_gateway_upstream_connections") == idle
    assert still_open == idle


async def test_labels_come_from_the_configuration_or_from_us(autojump_clock: MockClock) -> None:
    async with running_gateway(CONFIG) as world:
        _, metrics, _ = await run(world, 0)
        before = len(metrics)
        await gather(*[partial(world.ask, f"model-{n}", user=f"user-{n}") for n in range(50)])
        after = await world.metrics()

    values: dict[str, set[str]] = {}
    for name, labels in after:
        if name.startswith(("citadel_", "gen_ai_")):
            for label, value in labels:
                values.setdefault(label, set()).add(value)
    assert len(after) == before
    assert values["model"] == {"m", "n", "auto", "none"}
    assert values["endpoint"] == {endpoint("a"), endpoint("b"), endpoint("c"), "none"}
    results = {f"upstream_{status}" for status in (400, 429, 500)} | set(OUTCOMES)
    assert values["result"] <= results | {"ok", "cancelled", "timeout_idle"}
    assert values["outcome"] <= set(OUTCOMES.values()) | {"ok", "client_closed", "stream_broken"}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
async def test_the_page_of_metrics_is_as_prometheus_wants_it() -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        for stream in (False, True):
            await world.ask("m", stream=stream)
        await world.ask("gpt-7")
        page = await world.metrics_page()

    checked = await trio.run_process(
        [PROMTOOL or "", "check", "metrics"],
        stdin=page.encode(), capture_stdout=True, capture_stderr=True, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_a_run_can_be_repeated_exactly() -> None:
    async def once() -> dict[str, str]:
        async with running_gateway(CONFIG, seed=7) as world:
            crowd, _, _ = await run(world, 7)
        return crowd.outcomes

    first, second = (trio.run(once, clock=MockClock(autojump_threshold=0)) for _ in range(2))
    assert first == second
