"""Several workers' reports, told as one."""

from __future__ import annotations

from typing import Any

from citadel_gateway.app.host_report import merged_endpoints, merged_status


def endpoint(**changes: Any) -> dict[str, Any]:
    return {
        "url": "http://a", "healthy": True, "breaker": "closed", "in_flight": 1,
        "max_concurrent": 5, "limit": 4, "cordoned": False, "slow_start_share": 1.0, "weight": 2.0,
        "latency_seconds": 0.1, "last_error": None, "last_probe_seconds_ago": 3.0, **changes,
    }  # fmt: skip


def report(*models: str, status: str = "healthy", **changes: Any) -> dict[str, Any]:
    return {
        "gateway": "g",
        "status": status,
        "models": {
            name: {
                "status": "available", "endpoints": [endpoint(**changes)], "panic": False,
                "waiting": 2, "sources": [],
            }
            for name in models
        },
        "waiting_for_any_model": 1,
        "limits": {
            "in_flight": 1, "max_concurrent_requests": 25, "rate_limit_rps": 12.5, "queue_size": 25
        },
    }  # fmt: skip


def test_what_they_have_adds_up_and_the_worst_is_shown() -> None:
    merged = merged_status(
        report("m"),
        [
            report("m", status="unhealthy", healthy=False, breaker="open", last_error="refused"),
            report("m", breaker="half_open", latency_seconds=0.5, last_probe_seconds_ago=None),
        ],
    )

    (only,) = merged["models"]["m"]["endpoints"]
    assert only == endpoint(
        healthy=False, breaker="open", last_error="refused", latency_seconds=0.5,
        in_flight=3, max_concurrent=15, limit=12,
    )  # fmt: skip
    assert (merged["status"], merged["models"]["m"]["waiting"]) == ("unhealthy", 6)
    assert merged["waiting_for_any_model"] == 3
    assert merged["limits"] == {
        "in_flight": 3, "max_concurrent_requests": 75, "rate_limit_rps": 37.5, "queue_size": 75
    }  # fmt: skip


def test_only_models_that_the_key_may_see_are_told() -> None:
    merged = merged_status(report("mine"), [report("mine", "other")])

    assert [*merged["models"]] == ["mine"]


def test_no_rate_limit_is_no_rate_limit() -> None:
    reports = [report("m"), report("m")]
    for each in reports:
        each["limits"]["rate_limit_rps"] = None

    assert merged_status(reports[0], reports[1:])["limits"]["rate_limit_rps"] is None


def test_an_order_is_done_when_all_have_done_it() -> None:
    def told(in_flight: int, *, drained: bool, cordoned: bool = True) -> dict[str, Any]:
        each = {
            "model": "m", "endpoint": "http://a", "cordoned": cordoned, "in_flight": in_flight,
            "healthy": True,
        }  # fmt: skip
        return {"drained": drained, "endpoints": [each]}

    merged = merged_endpoints([told(0, drained=True), told(2, drained=False)])
    done = merged_endpoints([told(0, drained=True), told(0, drained=True)])

    assert (merged["drained"], merged["endpoints"][0]["in_flight"]) == (False, 2)
    assert done["drained"]
    assert "drained" not in merged_endpoints([{"endpoints": []}])
