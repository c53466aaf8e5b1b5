"""What was promised, and what was found."""

from __future__ import annotations

from collections.abc import Iterable

import attrs


@attrs.frozen
class Finding:
    """One line of the table.

    :param scene: which processes, and what happens to them.
    """

    scene: str
    promise: str
    found: str
    is_kept: bool


def table(findings: Iterable[Finding]) -> str:
    lines = ["| Scene | Promise | Found | |", "|---|---|---|---|"]
    for each in findings:
        kept = "kept" if each.is_kept else "**broken**"
        lines.append(f"| {each.scene} | {each.promise} | {each.found} | {kept} |")
    return "\n".join(lines) + "\n"
