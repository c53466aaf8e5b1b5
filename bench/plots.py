"""The plots of a comparison, as SVG written by hand: no library, no fonts, light and dark.

A plot is a list of marks on a canvas.  Lines are named where they end, bars and points beside
themselves, so that no legend is needed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import attrs

from bench.summary import OURS, Row, added_ms, rows

WIDTH = 760
# Readable on white and on near-black alike; ours is the one warm colour.
COLOURS = {
    "citadel": "#e8590c",
    "nginx": "#2f9e6e",
    "sglang-router": "#3b82f6",
    "vllm-router": "#a063d8",
    "litellm": "#8a8f98",
}
NAMES = {"citadel": "this gateway"}
STYLE = """\
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #3d444d }
.title { font-size: 16px; font-weight: 600; fill: #1f2328 }
.faint { fill: #6b737c; font-size: 12px }
.ours { font-weight: 600 }
.grid { stroke: #8a8f98; stroke-opacity: .25 }
.axis { stroke: #8a8f98 }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d1d9 } .title { fill: #f0f6fc } .faint { fill: #9198a1 }
}"""

Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    inner = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(math.log10(max(value, low)))


def decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten, or halves of them, around the values."""
    bottom = 10.0 ** math.floor(math.log10(low))
    top = 10.0 ** math.ceil(math.log10(high))
    return (bottom * 3 if low >= bottom * 3.3 else bottom, top * 0.3 if high <= top * 0.28 else top)


def log_ticks(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    marks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 3)]
    return [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]


def round_ticks(high: float, count: int = 5) -> list[float]:
    rough = high / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * i for i in range(math.ceil(high / step) + 1)]


def short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}".removesuffix(".0") if value >= 10 else f"{value:.2g}"


@attrs.define
class Canvas:
    height: int
    title: str
    subtitle: str
    marks: list[str] = attrs.field(factory=list)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        kind: str = "",
        fill: str = "",
    ) -> None:
        style = f' style="fill:{fill}"' if fill else ""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{style}>'
            f"{escape(text)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.marks.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, fill: str, fade: float) -> None:
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" '
            f'rx="2" fill="{fill}" fill-opacity="{fade}"/>'
        )

    def dot(
        self, x: float, y: float, fill: str, *, radius: float = 4, hollow: bool = False
    ) -> None:
        paint = f'fill="none" stroke="{fill}" stroke-width="2"' if hollow else f'fill="{fill}"'
        self.marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {paint}/>')

    def path(self, points: Sequence[tuple[float, float]], stroke: str, width: float) -> None:
        along = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.marks.append(
            f'<path d="M{along}" fill="none" stroke="{stroke}" stroke-width="{width}" '
            'stroke-linejoin="round"/>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img" '
            f'aria-label="{escape(self.title)}">\n<style>\n{STYLE}\n</style>'
        )
        title = (
            f'<text x="16" y="26" class="title">{escape(self.title)}</text>\n'
            f'<text x="16" y="46" class="faint">{escape(self.subtitle)}</text>'
        )
        return "\n".join([head, title, *self.marks, "</svg>", ""])


def name(row: Row) -> str:
    return NAMES.get(row.name, row.name)


def colour(row: Row) -> str:
    return COLOURS.get(row.name, "#8a8f98")


def weight(row: Row) -> str:
    return "ours" if row.name == OURS else ""


def apart(wanted: Sequence[float], distance: float) -> list[float]:
    """The places nearest to those wanted, in their order, that keep the distance."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    centre: list[float] = []
    for i in order:
        groups.append([i])
        centre.append(wanted[i])
        while len(groups) > 1 and (
            centre[-1] - centre[-2] < distance * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            merged = groups[-2] + groups[-1]
            middle = sum(wanted[j] for j in merged) / len(merged)
            groups[-2:], centre[-2:] = [merged], [middle]
    found = [0.0] * len(wanted)
    for group, middle in zip(groups, centre, strict=True):
        for place, i in enumerate(group):
            found[i] = middle + (place - (len(group) - 1) / 2) * distance
    return found


def request_bars(shown: Sequence[Row], loads: Sequence[str]) -> str | None:
    """CPU per whole request: a group of bars for each gateway, on a logarithmic axis."""
    costs = [c for row in shown for load in loads if (c := row.cost(load)) is not None]
    if not costs:
        return None
    with_costs = [row for row in shown if any(row.cost(load) is not None for load in loads)]
    thick, between, top = 15, 16, 66
    group = thick * len(loads) + between
    bottom = top + group * len(with_costs)
    canvas = Canvas(
        height=bottom + 50,
        title="CPU time per whole request",
        subtitle="each bar one load, from top to bottom: " + ", ".join(loads),
    )
    low, high = decades(min(costs), max(costs))
    x = logarithmic(low, high, 130, WIDTH - 80)
    for tick in log_ticks(low, high):
        canvas.line(x(tick), top - 6, x(tick), bottom - 4, "grid")
        canvas.text(x(tick), bottom + 14, short(tick), anchor="middle", kind="faint")
    canvas.text((130 + WIDTH - 80) / 2, bottom + 36, "µs per request, logarithmic",
                anchor="middle", kind="faint")  # fmt: skip
    for i, row in enumerate(with_costs):
        y = top + i * group
        canvas.text(120, y + thick * len(loads) / 2 + 4, name(row), anchor="end", kind=weight(row))
        for j, load in enumerate(loads):
            if (cost := row.cost(load)) is None:
                continue
            fade = (0.95, 0.7, 0.45)[j % 3]
            canvas.bar(x(low), y + j * thick, x(cost) - x(low), thick - 3, colour(row), fade)
            canvas.text(x(cost) + 6, y + j * thick + 10, short(cost), kind="faint")
    return canvas.svg()


@attrs.frozen
class Series:
    row: Row
    values: dict[str, float]  # by the load's name


def lines(
    series: Sequence[Series], columns: Sequence[str], *, title: str, subtitle: str, unit: str,
    log: bool,
) -> str | None:  # fmt: skip
    """Values over loads, each line named where it ends."""
    series = [one for one in series if one.values]
    known = [value for one in series for value in one.values.values()]
    if not known:
        return None
    canvas = Canvas(height=420, title=title, subtitle=subtitle)
    left, right, top, bottom = 64, WIDTH - 190, 86, 366
    if log:
        low, high = decades(min(known), max(known))
        y, ticks = logarithmic(low, high, bottom, top), log_ticks(low, high)
    else:
        ticks = round_ticks(max(known))
        y = linear(0, ticks[-1], bottom, top)
    for tick in ticks:
        canvas.line(left, y(tick), right + 8, y(tick), "grid")
        canvas.text(left - 8, y(tick) + 4, short(tick), anchor="end", kind="faint")
    x = linear(0, len(columns) - 1, left + 24, right - 8)
    for i, column in enumerate(columns):
        canvas.text(x(i), bottom + 20, column.removesuffix(" streams"), anchor="middle",
                    kind="faint")  # fmt: skip
    canvas.line(left, bottom, right + 8, bottom, "axis")
    canvas.text((left + right) / 2, bottom + 42, "open streams", anchor="middle", kind="faint")
    canvas.text(16, top - 14, unit, kind="faint")
    ends: list[tuple[Series, float, float, float]] = []
    for one in series:
        points = [
            (x(i), y(one.values[column]))
            for i, column in enumerate(columns)
            if column in one.values
        ]
        canvas.path(points, colour(one.row), 3 if one.row.name == OURS else 2)
        for px, py in points:
            canvas.dot(px, py, colour(one.row), radius=3.5)
        last = [value for column in columns if (value := one.values.get(column)) is not None][-1]
        ends.append((one, *points[-1], last))
    reaching = [end for end in ends if end[1] > x(len(columns) - 1) - 1]

    def label(one: Series, px: float, py: float, value: float, anchor: str = "start") -> None:
        text = f"{name(one.row)} \u00b7 {short(value)}"
        canvas.text(px, py + 4, text, anchor=anchor, kind=weight(one.row), fill=colour(one.row))

    places = apart([end[2] for end in reaching], 17)
    for (one, _, _, last), place in zip(reaching, places, strict=True):
        label(one, right + 10, place, last)
    for end in ends:
        if end not in reaching:
            one, px, py, last = end
            label(one, px, py + 17, last, "middle")
    return canvas.svg()


def latency_dots(found: dict[str, Any], shown: Sequence[Row]) -> str | None:
    points = [
        (row, p50, p99)
        for row in shown
        if (p50 := added_ms(found, row, "p50_ms")) is not None
        and (p99 := added_ms(found, row, "p99_ms")) is not None
        and p50 > 0
        and p99 > 0
    ]
    if not points:
        return None
    top, each = 72, 34
    bottom = top + each * len(points)
    canvas = Canvas(
        height=bottom + 50,
        title="Latency added to a whole request, one connection",
        subtitle="filled: median; ring: 99th percentile; both less what the engine alone takes",
    )
    low, high = decades(min(p for point in points for p in point[1:]), max(p[2] for p in points))
    x = logarithmic(low, high, 140, WIDTH - 110)
    for tick in log_ticks(low, high):
        canvas.line(x(tick), top - 8, x(tick), bottom - 4, "grid")
        canvas.text(x(tick), bottom + 14, short(tick), anchor="middle", kind="faint")
    canvas.text((140 + WIDTH - 110) / 2, bottom + 36, "ms, logarithmic", anchor="middle",
                kind="faint")  # fmt: skip
    for i, (row, p50, p99) in enumerate(points):
        y = top + each * i + 14
        canvas.text(120, y + 4, name(row), anchor="end", kind=weight(row))
        gap = math.copysign(min(5, abs(x(p99) - x(p50))), x(p99) - x(p50))
        canvas.path([(x(p50), y), (x(p99) - gap, y)], colour(row), 2)
        canvas.dot(x(p50), y, colour(row), radius=5)
        canvas.dot(x(p99), y, colour(row), hollow=True)
        both = f"{short(p50)} \u2013 {short(p99)}"
        canvas.text(max(x(p50), x(p99)) + 12, y + 4, both, kind="faint")
    return canvas.svg()


def draw(found: dict[str, Any]) -> dict[str, str]:
    """File name to SVG, of all plots that there is something for."""
    shown = rows(found)
    whole = [load["name"] for load in found["loads"] if load["seconds"]]
    streamed = [load["name"] for load in found["loads"] if not load["seconds"]]

    def costs(row: Row) -> dict[str, float]:
        return {load: c for load in streamed if (c := row.cost(load)) is not None}

    def memory(row: Row) -> dict[str, float]:
        open_ = {
            load: mb
            for load in streamed
            if (cell := row.cells.get(load)) and (mb := cell.resident_mb) is not None
        }
        return ({"idle": row.idle_mb} if row.idle_mb is not None else {}) | open_

    wanted = {
        "cpu-per-request.svg": request_bars(shown, whole),
        "cpu-per-chunk.svg": lines(
            [Series(row, costs(row)) for row in shown],
            streamed,
            title="CPU time per chunk of a stream",
            subtitle="4000 chunks a second in all from 200 streams on; litellm at a slower pace",
            unit="µs per chunk, logarithmic",
            log=True,
        ),
        "memory.svg": lines(
            [Series(row, memory(row)) for row in shown],
            ["idle", *streamed],
            title="Resident memory with streams open",
            subtitle="the whole process tree, all streams open",
            unit="MB",
            log=False,
        ),
        "latency.svg": latency_dots(found, shown),
    }
    return {file: svg for file, svg in wanted.items() if svg is not None}


def write(found: dict[str, Any], folder: Path) -> None:
    for file, svg in draw(found).items():
        (folder / file).write_text(svg)


if __name__ == "__main__":  # plots anew from what was measured before
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
