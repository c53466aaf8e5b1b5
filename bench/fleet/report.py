"""The figures of a fleet as Markdown.  Pure."""

from __future__ import annotations

from typing import Any

from bench.report import number, table

Figures = dict[str, Any]


def report(found: Figures) -> str:
    lines = ["# A fleet of gateways", ""]
    if simulated := found.get("simulation"):
        lines += [
            "Virtual time, one seed; the same figures every time. How: [README](../README.md); "
            "what follows from them: [SCALE](../SCALE.md).",
            "",
            *_limits(simulated["limits"]),
            *_away(simulated["away"]),
            *_caps(simulated["caps"]),
            *_churn(simulated["churn"]),
            *_load(simulated["load"]),
            *_idle(simulated["idle"]),
            *_news(simulated["breaker"], simulated["death"]),
        ]
    if stores := found.get("stores"):
        lines += _stores(stores)
    return "\n".join(lines)


def _off(accuracy: Figures) -> str:
    over, under = accuracy["most_over_percent"], accuracy["most_under_percent"]
    return f"{accuracy['off_percent']:+.1f} % ({under:+.1f} to {over:+.1f})"


def _limits(rows: list[Figures]) -> list[str]:
    body = [
        [str(r["gateways"]), str(r["admitted"]), str(r["exact"]), _off(r), number(r["excess"])]
        for r in rows
    ]
    return [
        "## A rate limit over all of them",
        "",
        "1 000 a second with a burst of as many, twice as much asked for, the busiest tenth of the "
        "gateways gets half of it, and every five seconds others are the busiest. Exact: what one "
        "bucket lets in that sees every request in its moment. In brackets: the worst windows of a "
        "second. Excess: the most units, ever, that were spent and not there.",
        "",
        *table(["gateways", "let in", "exact", "off", "excess"], body),
    ]


_PHASES = ("before", "first_5_s", "meanwhile", "next_5_s", "after")
_HOW = {
    "silent": "the store is silent",
    "half": "half of them cannot reach it",
    "forgets": "it forgets everything",
}


def _away(rows: list[Figures]) -> list[str]:
    body = [
        [
            f"{r['gateways']}, {_HOW[r['how']]}, {r['rate']:.0f}/s",
            *(_off(r[phase]) for phase in _PHASES),
            number(r["excess"]),
        ]
        for r in rows
    ]
    head = ["gateways", "before", "first 5 s", "the next 15", "5 s after", "then", "excess"]
    return [
        "## Without the store",
        "",
        "The same load; the store is away for twenty seconds. Each gateway then takes its even "
        "part of the limit, whatever it has to do, so that less is let in than might be where the "
        "load is uneven, and more for moments where those that had little to do get it.",
        "",
        *table(head, body),
    ]


def _caps(rows: list[Figures]) -> list[str]:
    body = [
        [
            f"{r['gateways']}, demand {r['demand']:.1f}",
            str(r["cap"]),
            str(r["most"]),
            f"{r['unused_while_waiting_percent']:.1f} %",
            f"{r['wait_p50_ms']:.0f} / {r['wait_p99_ms']:.0f}",
            f"{r['calls_per_s']['report']:.0f}",
        ]
        for r in rows
    ]
    head = [
        "gateways", "cap", "most at once", "free while somebody waited", "wait p50 / p99, ms",
        "reports/s",
    ]  # fmt: skip
    return [
        "## A cap on concurrency over all of them",
        "",
        "Requests of two seconds on average, 0.8 and 1.5 times as many as the cap has room for; at "
        "1.5 the queue grows without end, and so do the waits.",
        "",
        *table(head, body),
    ]


def _churn(rows: list[Figures]) -> list[str]:
    body = [
        [
            f"{r['gateways']}, {'some are cut off' if r['cuts'] else 'none is cut off'}",
            str(r["events"]),
            _off(r["limit"]),
            f"{r['most']} of {r['cap']}",
            f"{r['unused_while_waiting_percent']:.1f} %",
        ]
        for r in rows
    ]
    head = ["gateways", "events", "limit", "most at once", "free while somebody waited"]
    return [
        "## While gateways come, go and die",
        "",
        "Something happens every other second. Who is cut off from the store for six seconds, "
        "twice his lease, goes on with his even part while the others have it, too.",
        "",
        *table(head, body),
    ]


def _load(rows: list[Figures]) -> list[str]:
    sizes = sorted({r["gateways"] for r in rows})
    body = []
    for rate in sorted({r["offered"] for r in rows}):
        of = {r["gateways"]: r["calls_per_s"]["take"] for r in rows if r["offered"] == rate}
        body.append([f"{rate:.0f}", *(f"{of[n]:.0f} ({of[n] / n:.0f})" for n in sizes)])
    return [
        "## Questions to the store for rate limits, a second",
        "",
        "By requests a second of all gateways together; in brackets: of one gateway. What comes "
        "while the last question is on its way, a millisecond, goes with the next.",
        "",
        *table(["requests/s", *(f"{n} gateways" for n in sizes)], body),
    ]


def _idle(rows: list[Figures]) -> list[str]:
    body = [
        [
            str(r["gateways"]),
            str(r["endpoints"]),
            number(r["calls_per_s"]["meet"]),
            number(r["calls_per_s"]["report"]),
            number(r["calls_per_s"]["bytes"] / 1000),
            number(r["probes_per_endpoint_and_interval"]),
        ]
        for r in rows
    ]
    head = [
        "gateways", "endpoints", "meetings/s", "reports/s", "KB/s of meetings",
        "probes of an endpoint in each interval",
    ]  # fmt: skip
    return ["## When nobody asks anything", "", *table(head, body)]


def _news(breakers: list[Figures], deaths: list[Figures]) -> list[str]:
    opened = [[str(r["gateways"]), number(r["p50_s"]), number(r["max_s"])] for r in breakers]
    died = [
        [
            str(r["gateways"]),
            f"{number(r['shares_back']['p50_s'])} ({number(r['shares_back']['max_s'])})",
            f"{number(r['another_probes']['p50_s'])} ({number(r['another_probes']['max_s'])})",
        ]
        for r in deaths
    ]
    return [
        "## How soon all know",
        "",
        "Seconds from the moment when one gateway's breaker opens until all have it open:",
        "",
        *table(["gateways", "median", "longest"], opened),
        "Seconds from a gateway's death until others have its shares, and until another one probes "
        "in its place, median and longest; the lease is 3 s:",
        "",
        *table(["gateways", "shares", "probes"], died),
    ]


def _stores(stores: Figures) -> list[str]:
    about = stores["machine"]
    lines = [
        "# What real stores carry",
        "",
        f"{stores['date']}, {about['cores']} cores of {about['cpu']}, Python {about['python']}. "
        "Clients and server share the cores, so that the rates are not what a server of its own "
        "gives; CPU is. Of three rounds the one that was disturbed least. The wall is where the "
        "server's CPU fills one core.",
        "",
        "## LMDB, processes that all take as fast as they can",
        "",
        *table(
            ["processes", "takes/s", "CPU of a take, µs", "gave up after 20 ms"],
            [
                [
                    str(r["processes"]),
                    str(r["takes_per_s"]),
                    number(r["us_per_take"]),
                    f"{r['missed_percent']} %",
                ]
                for r in stores["lmdb"]
            ],
        ),
    ]
    redis = stores.get("redis")
    if redis is None:
        return lines
    return [
        *lines,
        "## Redis, rate limits: two buckets a request",
        "",
        *table(
            ["gateways", "requests at once in each", "takes/s here", "server's CPU, µs", "wall/s"],
            [
                [
                    str(r["processes"]),
                    str(r["requests_at_once"]),
                    str(r["takes_per_s"]),
                    number(r["server_us_per_take"]),
                    str(r["wall_takes_per_s"]),
                ]
                for r in redis["takes"]
            ],
        ),
        "## Redis, a meeting",
        "",
        *table(
            ["gateways", "endpoints", "server's CPU, µs", "wall/s"],
            [
                [
                    str(r["gateways"]),
                    str(r["endpoints"]),
                    number(r["server_us"]),
                    str(r["wall_per_s"]),
                ]
                for r in redis["meetings"]
            ],
        ),
        "## Redis, a report of caps that everybody wants more of",
        "",
        *table(
            ["gateways", "caps in it", "server's CPU, µs", "wall/s"],
            [
                [str(r["gateways"]), str(r["caps"]), number(r["server_us"]), str(r["wall_per_s"])]
                for r in redis["reports"]
            ],
        ),
    ]
