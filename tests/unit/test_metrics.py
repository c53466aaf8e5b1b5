"""The page that Prometheus scrapes: right, quick, and in nobody's way."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from citadel_gateway.io import metrics as module
from citadel_gateway.io.metrics import Levels, Metrics, StoreLevels
from citadel_gateway.io.record import Outcome, RequestRecord
from citadel_gateway.io.series import Counters, Histograms
from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.health_tracker import HealthTracker

ODD = 'a"b\\c\nd'


def endpoint(url: str) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(), lambda: 0.5)
    return Endpoint("m", url, 1.0, 7, None, breaker, HealthTracker(healthy=True))


def make_metrics(*endpoints: Endpoint, store: StoreLevels | None = None) -> Metrics:
    return Metrics(
        lambda: Levels(
            endpoints=endpoints,
            queue_depths={("m", "bulk"): 3},
            queue_waits={"m": 1.5},
            in_flight=1,
            tasks=5,
            connections=2,
            upstream_connections=4,
            draining=False,
            log_lines_dropped=0,
            now=1.0,
            store=store,
        )
    )


def finished(url: str) -> RequestRecord:
    return RequestRecord(
        request_id="r", route="/", client="c", began=0.0, ended=0.03, model="m", endpoint=url,
        outcome=Outcome.OK, stream=True, status=200, committed=0.02, overhead=0.001, attempts=1,
        prompt_tokens=5, completion_tokens=6,
    )  # fmt: skip


async def page(metrics: Metrics) -> str:
    return (await metrics.render()).decode()


def samples(text: str) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_the_text_is_the_one_that_prometheus_own_client_makes() -> None:
    registry, bounds = CollectorRegistry(), (0.001, 0.5, 1.0, 1e6)
    theirs = (
        Counter("hits", "Hits.", ["b", "a"], registry=registry),
        Histogram("wait", "Waits.", ["m"], buckets=bounds, registry=registry),
    )
    hits, waits = Counters("hits", "Hits.", ["b", "a"]), Histograms(
        "wait", "Waits.", ["m"], buckets=bounds
    )  # fmt: skip
    counters: list[Any] = [theirs[0], hits]
    for counter in counters:
        counter.labels("x", ODD).inc()
        counter.labels("x", ODD).inc(2.5)
        counter.labels("y", "z").inc()
    histograms: list[Any] = [theirs[1], waits]
    for histogram in histograms:
        for value in (0.0, 0.001, 0.2, 0.5, 3e9, 1.0):
            histogram.labels("m").observe(value)

    ours = "".join(piece for family in (hits, waits) for piece in family.pieces())
    expected = generate_latest(registry).decode()
    assert samples(ours) == samples(expected)
    heads = [line for line in ours.splitlines() if line.startswith("#")]
    assert heads == [line for line in expected.splitlines()
                     if line.startswith("#") and "_created" not in line]  # fmt: skip


async def test_levels_are_read_for_every_page() -> None:
    one = endpoint(ODD)
    metrics = make_metrics(one)
    before = samples(await page(metrics))
    one.in_flight = 5
    after = samples(await page(metrics))

    labels = (("endpoint", ODD), ("model", "m"))
    assert ("citadel_gateway_in_flight", labels, 0.0) in before
    assert ("citadel_gateway_in_flight", labels, 5.0) in after
    assert ("citadel_gateway_endpoint_healthy", labels, 1.0) in after
    assert ("citadel_gateway_endpoint_max_concurrent", labels, 7.0) in after
    waiting = (("model", "m"), ("priority", "bulk"))
    assert ("citadel_gateway_queue_depth", waiting, 3.0) in after
    predicted = "citadel_gateway_queue_predicted_wait_seconds"
    assert (predicted, (("model", "m"),), 1.5) in after


async def test_a_histogram_is_there_under_opentelemetrys_name_as_well() -> None:
    metrics = make_metrics()
    metrics.finished(finished("http://a"))
    found = samples(await page(metrics))

    ours = ("citadel_gateway_request_duration_seconds_sum", (("model", "m"),), 0.03)
    theirs = (
        "gen_ai_server_request_duration_seconds_sum", (("gen_ai_request_model", "m"),), 0.03,
    )  # fmt: skip
    assert {ours, theirs} <= found


async def test_no_family_is_there_twice_or_in_pieces() -> None:
    metrics = make_metrics(endpoint("http://a"), endpoint("http://b"))
    metrics.finished(finished("http://a"))
    text = await page(metrics)

    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) > 20
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families))


async def test_others_have_their_turn_while_a_page_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SLICE", 0.0)
    metrics = make_metrics(*(endpoint(str(i)) for i in range(100)))
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await metrics.render()
        nursery.cancel_scope.cancel()

    assert turns >= 500


async def test_who_asks_while_a_page_is_made_gets_that_one(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(module, "_SLICE", 0.0)
    metrics = make_metrics(endpoint("http://a"))
    pages = []

    async def scrape() -> None:
        pages.append(await metrics.render())

    async with trio.open_nursery() as scraping:
        for _ in range(5):
            scraping.start_soon(scrape)
    later = await metrics.render()

    assert len({id(one) for one in pages}) == 1
    assert later is not pages[0]


async def test_a_scraper_that_leaves_takes_the_page_from_nobody() -> None:
    metrics = make_metrics(endpoint("http://a"))
    with trio.CancelScope() as scope:
        scope.cancel()
        await metrics.render()

    assert "citadel_gateway_draining 0.0" in await page(metrics)


async def test_what_was_counted_of_an_endpoint_goes_a_while_after_it() -> None:
    metrics = make_metrics()
    for url in ("http://a", "http://b"):
        metrics.finished(finished(url))
        metrics.attempted(endpoint(url), "ok")
    metrics.finished(finished(""))
    seen = []
    for now in (0.0, 299.0, 300.0):
        metrics.forget_absent({"http://b"}, {"m"}, now)
        seen.append("http://a" in await page(metrics))
    left = samples(await page(metrics))

    assert seen == [True, True, False]
    of_requests = {dict(labels)["endpoint"] for name, labels, _ in left
                   if name == "citadel_gateway_requests_total"}  # fmt: skip
    assert of_requests == {"http://b", "none"}


async def test_an_endpoint_that_returns_in_time_keeps_its_counts() -> None:
    metrics = make_metrics()
    metrics.attempted(endpoint("http://a"), "ok")
    for known, now in ((set[str](), 0.0), ({"http://a"}, 200.0), (set[str](), 400.0)):
        metrics.forget_absent(known, {"m"}, now)

    assert "http://a" in await page(metrics)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_wrong() -> None:
    metrics = make_metrics(endpoint("http://a"), endpoint(ODD))
    metrics.finished(finished("http://a"))
    metrics.attempted(endpoint("http://a"), "ok")
    metrics.timed_out("idle", "m")
    text = await page(metrics)

    done = await trio.run_process(
        ["promtool", "check", "metrics"],
        stdin=text.encode(),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
