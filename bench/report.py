"""The tables of a comparison, as Markdown.  Pure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.summary import REFERENCE, Cell, Row, added_ms, direct, ratio, rows

NAMES = {"citadel": "**this gateway**"}


def number(value: float | None, unit: str = "") -> str:
    """Three digits that mean something."""
    if value is None:
        return "—"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}{unit}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|---" + "|--:" * (len(head) - 1) + "|",
        *("| " + " | ".join(line) + " |" for line in body),
        "",
    ]


def titled(row: Row) -> str:
    return NAMES.get(row.name, row.name)


def per_load(
    shown: Sequence[Row], names: Sequence[str], text: Callable[[Row, str], str]
) -> list[str]:
    """A line for each gateway, a column for each load; problems in their place."""
    body = []
    for row in shown:
        if row.problem and not row.cells:
            body.append([titled(row), row.problem, *[""] * (len(names) - 1)])
        else:
            body.append([titled(row), *(text(row, name) for name in names)])
    return table(["gateway", *names], body)


def cost_tables(found: dict[str, Any], shown: Sequence[Row]) -> list[str]:
    reference = next((row for row in shown if row.name == REFERENCE), None)

    def mark(cell: Cell, own: bool) -> str:
        kept = cell.pace is None or cell.pace > 0.95
        return ("" if kept else "†") + ("*" if own else "")

    def cost(row: Row, load: str) -> str:
        cell = row.cells.get(load)
        if cell is None:
            return "—"
        if cell.cost_us is None:
            return "not all open" if "streams" in load else "none answered"
        own = load in found["gateways"][row.name]["own_loads"]
        times = ratio(cell.cost_us, reference.cost(load) if reference else None)
        return f"{number(cell.cost_us)}{mark(cell, own)} ({number(times)})"

    whole = [load["name"] for load in found["loads"] if load["seconds"]]
    streamed = [load["name"] for load in found["loads"] if not load["seconds"]]
    paces = ", ".join(
        f"{load['connections']} at {load['pace']}/s"
        for load in found["loads"]
        if not load["seconds"]
    )
    return [
        "## CPU per whole request, µs",
        "",
        f"In brackets: times {REFERENCE}.",
        "",
        *per_load(shown, whole, cost),
        "## CPU per chunk of a stream, µs",
        "",
        f"All streams open, {paces}. In brackets: times {REFERENCE}. * at a slower pace, because "
        f"it would be saturated: {slower(found)}. — not run: it would be saturated. † more than "
        "5 % of the chunks came late: it was saturated, and what it uses per chunk is then "
        "flattered by chunks that travel together. Not all open: nor were they after 40 s.",
        "",
        *per_load(shown, streamed, cost),
    ]


def slower(found: dict[str, Any]) -> str:
    own = [
        f"{load['connections']} streams at {load['pace']}/s ({name})"
        for name, gateway in found["gateways"].items()
        for load in gateway["own_loads"].values()
    ]
    return ", ".join(own) or "none"


def growth_table(shown: Sequence[Row]) -> list[str]:
    body = [
        [
            titled(row),
            number(ratio(row.cost("64 connections"), row.cost("1 connection"))),
            number(ratio(row.cost("4000 streams"), row.cost("200 streams"))),
        ]
        for row in shown
    ]
    head = ["gateway", "request: 64 connections / 1", "chunk: 4000 streams / 200"]
    return ["## How the cost grows with load", "", *table(head, body)]


def latency_table(found: dict[str, Any], shown: Sequence[Row]) -> list[str]:
    def first(row: Row, load: str, quantile: str) -> str:
        cell = row.cells.get(load)
        return number(getattr(cell, quantile) if cell else None)

    body = [
        [
            titled(row),
            number(added_ms(found, row, "p50_ms")),
            number(added_ms(found, row, "p99_ms")),
            first(row, "200 streams", "p50_ms"),
            first(row, "200 streams", "p99_ms"),
            first(row, "200 streams", "gap_ms"),
            first(row, "4000 streams", "gap_ms"),
        ]
        for row in shown
    ]
    return [
        "## Added latency, ms",
        "",
        "Whole requests, one connection: the quantile through the gateway less the same quantile "
        f"straight to the engine ({number(direct(found, 'p50_ms'))} ms and "
        f"{number(direct(found, 'p99_ms'))} ms). First chunk: from the request to the first chunk "
        "while 200 streams are being opened, engine included. Gap: the longest between two chunks "
        "of a stream, of 200 streams whose chunks are due every 50 ms, and of 4000, every second.",
        "",
        *table(["gateway", "p50", "p99", "first chunk p50", "p99", "gap at 200", "at 4000"], body),
    ]


def memory_table(shown: Sequence[Row]) -> list[str]:
    def loaded(row: Row) -> float | None:
        known = [c.resident_mb for c in row.cells.values() if c.resident_mb is not None]
        return max(known, default=None)

    body = [
        [
            titled(row),
            number(row.idle_mb),
            number(loaded(row)),
            number(row.growth_kb(1000)),
            number(row.growth_kb(4000)),
        ]
        for row in shown
    ]
    return [
        "## Memory, resident",
        "",
        "Idle: after the first answer. Per stream: growth since then, divided by the open streams.",
        "",
        *table(
            ["gateway", "idle, MB", "largest under load, MB", "KB per stream at 1000", "at 4000"],
            body,
        ),
    ]


def failure_table(found: dict[str, Any], shown: Sequence[Row]) -> list[str]:
    def failed(row: Row, load: str) -> str:
        cell = row.cells.get(load)
        return f"{cell.failed} of {cell.requests + cell.failed}" if cell else "—"

    names = [load["name"] for load in found["loads"]]
    return [
        "## Failed or cut, all rounds",
        "",
        *per_load(shown, names, failed),
    ]


def scale_section(found: dict[str, Any]) -> list[str]:
    scale = found["scale"]
    if "problem" in scale:
        return ["## A thousand endpoints", "", f"Not measured: {scale['problem']}", ""]
    few, many, scrape = scale["few"], scale["many"], scale["metrics"]
    body = [
        [
            f"`{name}`",
            number(row["few_us"]),
            number(row["many_us"]),
            number(row["many_us"] - row["few_us"]),
            str(row["failed"]),
        ]
        for name, row in scale["choosing"].items()
    ]
    return [
        "## A thousand endpoints, this gateway",
        "",
        f"CPU per whole request, µs, 16 connections, {few} endpoints and {many}:",
        "",
        *table(["algorithm", str(few), str(many), "difference", "failed"], body),
        f"`/metrics` with {many} endpoints ({scrape['kilobytes']} KB): answered in "
        f"{number(scrape['idle_ms'])} ms idle, {number(scrape['busy_ms'])} ms (at most "
        f"{number(scrape['busy_max_ms'])} ms) with 100 streams running. Largest gap between two "
        f"chunks, which are due every {number(scrape['nominal_gap_ms'])} ms: "
        f"{number(scrape['gap_undisturbed_ms'])} ms without scrapes, "
        f"{number(scrape['gap_disturbed_ms'])} ms with; {scrape['failed']} streams failed.",
        "",
    ]


def spread_line(shown: Sequence[Row]) -> list[str]:
    spreads = [(cell.spread, row.name, load) for row in shown for load, cell in row.cells.items()]
    if not spreads:
        return []
    worst, name, load = max(spreads)
    middle = sorted(spreads)[len(spreads) // 2][0]
    return [
        f"Between rounds, the costs above differ by {middle:.0%} of their median in the middle "
        f"case, and by {worst:.0%} in the worst ({name}, {load}).",
        "",
    ]


def set_up(found: dict[str, Any]) -> list[str]:
    lines = ["## What was run", ""]
    for name, gateway in found["gateways"].items():
        lines += [f"### {name} {gateway['version']}".rstrip(), "", gateway["note"], ""]
        if gateway["problem"]:
            lines += [f"**{gateway['problem']}**", ""]
        if gateway["command"]:
            env = "".join(f"{key}={value} " for key, value in gateway["env"].items())
            lines += ["```sh", env + gateway["command"], "```", ""]
        if gateway["config"]:
            lines += ["```", gateway["config"].rstrip(), "```", ""]
    return lines


def markdown(found: dict[str, Any]) -> str:
    shown, machine = rows(found), found["machine"]
    lines = [
        "# Side by side",
        "",
        f"{found['date']}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB, Python {machine['python']}; "
        f"medians of {found['rounds']} round{'s' if found['rounds'] != 1 else ''}. "
        "Method and caveats: [README](../README.md). Everything that was measured: "
        "[compare.json](compare.json).",
        "",
        *cost_tables(found, shown),
        *growth_table(shown),
        *latency_table(found, shown),
        *memory_table(shown),
        *failure_table(found, shown),
        *(spread_line(shown) if found["rounds"] > 1 else []),
        *scale_section(found),
        *set_up(found),
    ]
    return "\n".join(lines)


if __name__ == "__main__":  # tables anew from what was measured before
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
