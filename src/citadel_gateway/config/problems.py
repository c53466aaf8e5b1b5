"""What is wrong with a configuration, in the user's words and at the user's path.

Messages never repeat what may hold a credential; what they do repeat is cut short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import attrs

Steps = tuple[str | int, ...]


@attrs.frozen
class Problem:
    """One line for the user; *path* has a string for each key and a number for each list item."""

    path: Steps
    message: str

    def __str__(self) -> str:
        dotted = ""
        for step in self.path:
            text = step if isinstance(step, str) and step.isprintable() else repr(step)
            dotted += f"[{step}]" if isinstance(step, int) else f".{cut(text)}"
        return f"{dotted.removeprefix('.')}: {self.message}" if dotted else self.message


class InvalidConfig(Exception):
    """All problems of one configuration."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def suggestion(word: str, options: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing when no option is close."""
    by_folded = {option.casefold(): option for option in options}
    # difflib takes quadratic time; no option is anywhere near so long.
    close = get_close_matches(word[:100].casefold(), by_folded, n=1)
    return f"; did you mean {by_folded[close[0]]!r}?" if close else ""


def show(raw: object) -> str:
    """The value as a YAML user would recognise it; containers by kind only."""
    if raw is None or isinstance(raw, bool):
        return {None: "null", True: "true", False: "false"}[raw]
    if isinstance(raw, int) and raw.bit_length() > 64:
        return "a huge number"  # repr() refuses thousands of digits
    if isinstance(raw, (str, int, float)):
        return cut(repr(raw))
    return kind_of(raw)


def cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(raw: object) -> str:
    match raw:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return f"a {type(raw).__name__}"
