"""Who has come, who has gone and who is another than before, of those that sources list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import attrs

T = TypeVar("T")


@attrs.frozen
class Arrivals:
    """What leads from one list to the next, by name and in the order of the lists.

    :param changed: those that stay, and of whom something else is said.
    """

    come: tuple[str, ...]
    gone: tuple[str, ...]
    changed: tuple[str, ...]


def compare(before: Mapping[str, T], wanted: Mapping[str, T]) -> Arrivals:
    """How to get from *before* to *wanted*; who is the same in both is not touched."""
    return Arrivals(
        come=tuple(name for name in wanted if name not in before),
        gone=tuple(name for name in before if name not in wanted),
        changed=tuple(n for n, said in wanted.items() if n in before and before[n] != said),
    )
