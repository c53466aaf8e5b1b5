"""What the scenarios found, as a table for the terminal, as Markdown and as JSON.  Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.scenarios.client import Told
from tests.scenarios.judging import Grade
from tests.scenarios.runner import Card, Played, Result
from tests.scenarios.scenario import CLOCKS, SCENARIOS, Scenario

_MANY = 20
_NAMES = {"citadel": "this gateway"}


def title(card: Card) -> str:
    return _NAMES.get(card.gateway.name, card.gateway.name)


def score(card: Card, prefix: str = "") -> str:
    """How many of each grade: `13 pass, 3 safe`."""
    counts = {grade: card.count(grade, prefix=prefix) for grade in Grade}
    return ", ".join(f"{count} {grade.word}" for grade, count in counts.items() if count) or "none"


def plain(card: Card) -> str:
    """For the terminal: a line for each scenario."""
    if card.problem:
        return f"{card.gateway.name} {card.version}: {card.problem}"
    lines = [f"{card.gateway.name} {card.version}, {card.seconds:.0f} s"]
    for result in card.results:
        verdict, asked = result.verdict, ", ".join(map(_asked, result.played))
        why = "; ".join(filter(None, (verdict.why, verdict.note)))
        why = why and f": {why}"
        lines.append(
            f"  {result.scenario.id}  {verdict.grade.word:<8}"
            f"{result.scenario.title}{why}  [{asked}]"
        )
    lines.append(f"  sixteen: {score(card, 'S')}")
    if beyond := score(card, "X"):
        lines.append(f"  beyond:  {beyond}")
    return "\n".join(lines)


def _asked(played: Played) -> str:
    primary, backup = played.asked
    return f"{played.shape.value} {primary}+{backup}"


def markdown(cards: Sequence[Card], *, pace: float, date: str, machine: dict[str, Any]) -> str:
    names = [name for name in sorted(SCENARIOS) if any(_of(card, name) for card in cards)]
    head = ["", "scenario", *(f"{title(card)} {card.version}".rstrip() for card in cards)]
    lines = [
        "# When engines fail",
        "",
        f"{date}, {machine['cores']} cores of {machine['cpu']}, Python {machine['python']}. "
        "`make scenarios` makes this page; everything that was seen is in "
        "[scenarios.json](scenarios.json).",
        "",
        "S01 to S16 are our own version of the sixteen scenarios of the field's public failure "
        "benchmark, written from their description; X01 and on are ours. Each is two scripted "
        "engines, one of them at fault, with the gateway between them and the clients. Judged is "
        "only what clients and engines saw.",
        "",
        "- **pass**: all that the scenario asks for, in the words below.",
        "- **partial**: the right answer, but late, too dear, or with something to stumble over.",
        "- **safe**: no answer, and the client was told so.",
        "- **fail**: a part passed off as the whole, a wrong text, no end, or an engine left to "
        "work for nobody.",
        "",
        f"All durations are the benchmark's; here, each of its seconds took {pace:g} s. Only "
        "`Retry-After` is in real seconds, which a header has no others for. Everybody is given, "
        f"where there is such a thing: {CLOCKS.retries} retries, {CLOCKS.request:g} s for a "
        f"request, {CLOCKS.silence:g} s for an engine to say something, a breaker that opens "
        f"after {CLOCKS.failures} failures for {CLOCKS.rest:g} s, a health check every "
        f"{CLOCKS.health:g} s.",
        "",
        *_table(head, [_row(SCENARIOS[name], cards) for name in names]),
        *_table(
            ["", *head[2:]],
            [
                ["S01 to S16", *(score(card, "S") for card in cards)],
                ["X01 and on", *(score(card, "X") for card in cards)],
            ],
        ),
        "## What counts as passing",
        "",
        *(f"- **{name}**, {SCENARIOS[name].title}: {SCENARIOS[name].passes}" for name in names),
        "",
        *_details(cards, names),
        *_set_up(cards),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _of(card: Card, name: str) -> Result | None:
    return next((result for result in card.results if result.scenario.id == name), None)


def _row(scenario: Scenario, cards: Sequence[Card]) -> list[str]:
    cells = []
    for card in cards:
        result = _of(card, scenario.id)
        if card.problem or result is None:
            cells.append("—")
        else:
            word = result.verdict.grade.word
            word = f"**{word}**" if result.verdict.grade is Grade.PASS else word
            note = result.verdict.note
            cells.append(f"{word}, {note}" if note else word)
    return [scenario.id, scenario.title, *cells]


def _details(cards: Sequence[Card], names: Sequence[str]) -> list[str]:
    """Why it was not a pass, and how often the engines were asked."""
    body = []
    for name in names:
        for card in cards:
            result = _of(card, name)
            if result is None or result.verdict.grade is Grade.PASS:
                continue
            asked = ", ".join(map(_asked, result.played))
            body.append([name, title(card), result.verdict.grade.word, result.verdict.why, asked])
    head = ["", "gateway", "grade", "why", "asked: faulty engine + other"]
    return ["## What was not a pass, and why", "", *_table(head, body)]


def _set_up(cards: Sequence[Card]) -> list[str]:
    lines = ["## What was run", ""]
    for card in cards:
        lines += [f"### {title(card)} {card.version}".rstrip(), "", card.gateway.note, ""]
        if card.problem:
            lines += [f"**{card.problem}**", ""]
        if not card.examples:
            continue
        example = card.examples[0]
        lines += ["For one scenario:", "", "```sh", example.command, "```", ""]
        if example.config:
            lines += ["```yaml", example.config, "```", ""]
    return lines


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body),
        "",
    ]


def as_json(cards: Sequence[Card], *, pace: float, date: str, machine: dict[str, Any]) -> str:
    found = {
        "date": date,
        "machine": machine,
        "pace": pace,
        "gateways": {card.gateway.name: _card(card) for card in cards},
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _card(card: Card) -> dict[str, Any]:
    return {
        "version": card.version,
        "problem": card.problem,
        "seconds": round(card.seconds, 1),
        "score": {"S": score(card, "S"), "X": score(card, "X")},
        "results": {result.scenario.id: _result(result) for result in card.results},
    }


def _result(result: Result) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "title": result.scenario.title,
        "grade": verdict.grade.word,
        "why": verdict.why,
        "note": verdict.note,
        "played": [
            {
                "shape": played.shape.value,
                "grade": played.verdict.grade.word,
                "why": played.verdict.why,
                "faulty_engine_asked": played.asked[0],
                "other_asked": played.asked[1],
                **_tellings(played.told),
            }
            for played in result.played
        ],
    }


def _tellings(told: Sequence[Told]) -> dict[str, Any]:
    """Each of them, or their sum where there are many."""
    if len(told) <= _MANY:
        return {"told": [_told(one) for one in told]}
    return {
        "ends": dict(Counter(one.end.value for one in told)),
        "slowest": round(max(one.seconds for one in told), 3),
    }


def _told(told: Told) -> dict[str, Any]:
    """In real seconds."""
    first = None if told.first is None else round(told.first - told.began, 3)
    return {
        "end": told.end.value,
        "status": told.status,
        "code": told.code,
        "words": len(told.text.split()),
        "model": told.model,
        "seconds": round(told.seconds, 3),
        "first_word": first,
        "longest_gap": round(told.gap, 3),
    }
