"""From everything that was measured to the few numbers that tables and plots show.  Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import attrs

REFERENCE = "sglang-router"
OURS = "citadel"


@attrs.frozen(kw_only=True)
class Cell:
    """One gateway under one load; medians over the rounds."""

    cost_us: float | None  # CPU per request, or per chunk
    spread: float  # largest minus smallest, as a share of the median
    failed: int  # in all rounds
    requests: int  # in all rounds
    resident_mb: float | None
    share: float | None  # of the CPU time of one core, while it was measured
    pace: float | None = None  # chunks that came, as a share of those that were due
    gap_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None


@attrs.frozen(kw_only=True)
class Row:
    name: str
    version: str
    problem: str
    idle_mb: float | None
    cells: dict[str, Cell]

    def cost(self, load: str) -> float | None:
        cell = self.cells.get(load)
        return cell.cost_us if cell else None

    def growth_kb(self, streams: int) -> float | None:
        """Memory of one open stream."""
        cell = self.cells.get(f"{streams} streams")
        if cell is None or cell.resident_mb is None or self.idle_mb is None:
            return None
        return (cell.resident_mb - self.idle_mb) * 1024 / streams


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def unary_cost(report: dict[str, Any]) -> float | None:
    done = report.get("requests", 0)
    return 1e6 * report["cpu_s"] / done if done and "cpu_s" in report else None


def stream_cost(report: dict[str, Any]) -> float | None:
    window = report.get("window") or {}
    return 1e6 * window["cpu_s"] / window["chunks"] if window.get("chunks") else None


def cell(load: dict[str, Any], reports: list[dict[str, Any]]) -> Cell:
    streamed = not load["seconds"]
    costs = [stream_cost(r) if streamed else unary_cost(r) for r in reports]
    known = [cost for cost in costs if cost is not None]
    middle = median(known)
    used = [(r.get("window") or {}) if streamed else r for r in reports]
    return Cell(
        cost_us=middle,
        spread=(max(known) - min(known)) / middle if middle else 0.0,
        failed=sum(r["failed"] for r in reports),
        requests=sum(r["requests"] for r in reports),
        resident_mb=median(u.get("resident_mb") for u in used),
        share=median(ratio(u.get("cpu_s"), u.get("seconds")) for u in used),
        pace=median(
            ratio(u.get("chunks"), load["connections"] * load["pace"] * u.get("seconds", 0))
            for u in used
        )
        if streamed
        else None,
        gap_ms=median(r.get("largest_gap_ms") for r in reports),
        p50_ms=median(r.get("p50_ms") for r in reports),
        p99_ms=median(r.get("p99_ms") for r in reports),
    )


def rows(found: dict[str, Any]) -> list[Row]:
    loads = {load["name"]: load for load in found["loads"]}
    return [
        Row(
            name=name,
            version=gateway["version"],
            problem=gateway["problem"],
            idle_mb=median(gateway["idle_mb"]),
            cells={
                load: cell({**loads[load], **gateway["own_loads"].get(load, {})}, reports)
                for load, reports in gateway["loads"].items()
            },
        )
        for name, gateway in found["gateways"].items()
    ]


def direct(found: dict[str, Any], quantile: str) -> float | None:
    """What the engine alone takes, ms."""
    return median(report.get(quantile) for report in found["direct"])


def added_ms(found: dict[str, Any], row: Row, quantile: str) -> float | None:
    """Latency at one connection, less what the engine alone takes."""
    cell = row.cells.get(found["loads"][0]["name"])
    through, alone = (getattr(cell, quantile) if cell else None), direct(found, quantile)
    return through - alone if through is not None and alone is not None else None
