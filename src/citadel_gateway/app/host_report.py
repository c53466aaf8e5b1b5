"""The reports of several workers as the one of their gateway.

What they have adds up.  What they think of an endpoint, each for itself, is shown at its worst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Json = dict[str, Any]

_BREAKERS = ("closed", "half_open", "open")
_STATES = ("healthy", "degraded", "unhealthy")

_SUMS = ("in_flight", "max_concurrent", "limit")


def merged_status(own: Json, others: Sequence[Json], *, has_store: bool = False) -> Json:
    """``/models/status``: of the models that *own* shows, because others are not for this key.

    :param has_store: workers share their caps and rates, and so each tells the whole.
    """
    reports = [own, *others]
    merged = {
        **own,
        "status": max((r["status"] for r in reports), key=_STATES.index),
        "models": {
            name: _model(model, [r["models"][name] for r in reports if name in r["models"]])
            for name, model in own["models"].items()
        },
        "waiting_for_any_model": sum(r["waiting_for_any_model"] for r in reports),
        "limits": _limits([r["limits"] for r in reports]),
    }
    if has_store:
        for name in ("max_concurrent_requests", "rate_limit_rps"):
            merged["limits"][name] = own["limits"][name]
        for name, model in merged["models"].items():
            whole = {e["url"]: e["max_concurrent"] for e in own["models"][name]["endpoints"]}
            for endpoint in model["endpoints"]:
                endpoint["max_concurrent"] = whole.get(endpoint["url"], endpoint["max_concurrent"])
    return merged


def merged_endpoints(reports: Sequence[Json]) -> Json:
    """What orders are answered with."""
    found: dict[tuple[str, str], Json] = {}
    for report in reports:
        for each in report["endpoints"]:
            before = found.setdefault((each["model"], each["endpoint"]), each)
            if before is not each:
                found[each["model"], each["endpoint"]] = {
                    **before,
                    "in_flight": before["in_flight"] + each["in_flight"],
                    "cordoned": before["cordoned"] and each["cordoned"],
                    "healthy": before["healthy"] and each["healthy"],
                }
    merged: Json = {"endpoints": [*found.values()]}
    if any("drained" in report for report in reports):
        merged = {"drained": all(report.get("drained") for report in reports), **merged}
    return merged


def _model(own: Json, models: Sequence[Json]) -> Json:
    urls = list(dict.fromkeys(e["url"] for model in models for e in model["endpoints"]))
    return {
        "status": own["status"],
        "endpoints": [
            _endpoint([e for model in models for e in model["endpoints"] if e["url"] == url])
            for url in urls
        ],
        "sources": _sources([source for model in models for source in model["sources"]]),
        "panic": any(model["panic"] for model in models),
        "waiting": sum(model["waiting"] for model in models),
    }


def _sources(seen: Sequence[Json]) -> list[Json]:
    """Each once, as whoever is worst off with it sees it."""
    worst: dict[tuple[str, str], Json] = {}
    for each in seen:
        before = worst.setdefault((each["source"], each["name"]), each)
        if each["problems"] and not before["problems"]:
            worst[each["source"], each["name"]] = each
    return [*worst.values()]


def _endpoint(seen: Sequence[Json]) -> Json:
    merged = {**seen[0], **{name: sum(e[name] for e in seen) for name in _SUMS}}
    merged["healthy"] = all(e["healthy"] for e in seen)
    merged["cordoned"] = any(e["cordoned"] for e in seen)
    merged["breaker"] = max((e["breaker"] for e in seen), key=_BREAKERS.index)
    merged["latency_seconds"] = max(e["latency_seconds"] for e in seen)
    merged["slow_start_share"] = min(e["slow_start_share"] for e in seen)
    merged["last_error"] = next((e["last_error"] for e in seen if e["last_error"]), None)
    probes = [e["last_probe_seconds_ago"] for e in seen if e["last_probe_seconds_ago"] is not None]
    merged["last_probe_seconds_ago"] = min(probes, default=None)
    return merged


def _limits(limits: Sequence[Json]) -> Json:
    add: Callable[[str], Any] = lambda name: sum(part[name] or 0 for part in limits)  # noqa: E731
    merged = {name: add(name) for name in limits[0]}
    if limits[0]["rate_limit_rps"] is None:
        merged["rate_limit_rps"] = None
    return merged
