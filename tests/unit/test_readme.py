"""What the README lists is what there is: its tables are checked against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import citadel_gateway
from citadel_gateway.app.host_metrics import HostMetrics
from citadel_gateway.io.metrics import StoreLevels
from citadel_gateway.io.record import is_our_finding
from tests.unit.test_metrics import endpoint, finished, make_metrics, page
from tests.unit.test_openapi import every_error

SOURCE = Path(citadel_gateway.__file__).parent
README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def section(heading: str) -> str:
    """The text under *heading*, up to the next one of any level."""
    return re.split(r"^#+ ", README.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[
        0
    ]


def rows(text: str) -> list[list[str]]:
    """The cells of the table in *text*, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.endswith(" |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def listed_codes() -> dict[str, str]:
    """Every code in the README, and the cell of its status."""
    text = README.partition("`code` is one of:\n\n")[2].partition("\n\n")[0]
    return {code: status for status, codes, *_ in rows(text) for code in quoted(codes)}


def written_codes() -> set[str]:
    """Every ``code="..."`` in the gateway's source, and every finding about an upstream."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] == "sim":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.keyword(arg="code", value=ast.Constant(str(code))):
                    found.add(code)
                case ast.Constant(str(code)) if is_our_finding(code):
                    found.add(code)
    return found


def test_every_error_is_listed_with_its_status() -> None:
    listed = listed_codes()

    for error in every_error():
        status = listed.get(str(error.code), "")
        assert str(error.status) in status or " to " in status, f"{error.code} {error.status}"


def test_the_codes_are_those_of_the_code() -> None:
    known = {str(error.code) for error in every_error()} | written_codes()

    listed = {code for code, status in listed_codes().items() if not status.startswith("as the")}
    assert listed == known


async def test_every_family_of_metrics_is_listed_and_there_is_no_other() -> None:
    store = StoreLevels(is_up=True, members=2, misses=0)
    metrics = make_metrics(endpoint("http://a"), store=store)
    metrics.finished(finished("http://a"))
    host = HostMetrics()
    host.note_workers(2, 2)
    text = await page(metrics) + host.page(0.0)
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))

    listed = [name for row in rows(section("## Metrics")) for name in quoted(row[0])]
    assert len(listed) == len({*listed})
    assert {*listed} == {
        name.removeprefix("citadel_gateway_")
        for name in families
        if not name.startswith(("process_", "python_"))
    }
