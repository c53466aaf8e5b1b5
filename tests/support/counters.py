"""Counters never fall: a look at all of them, again and again."""

from __future__ import annotations

import attrs

from tests.support.ledger import Metrics

_GROW = ("_total", "_count", "_bucket", "_sum")


@attrs.define(eq=False)
class CounterWatch:
    """Takes one page of metrics after the other.

    :param fallen: what was less than before, or gone, and by how much.
    """

    fallen: list[str] = attrs.field(factory=list)
    pages: int = 0
    _last: Metrics = attrs.field(factory=dict)

    def take(self, page: Metrics) -> None:
        for key, value in self._last.items():
            if key[0].endswith(_GROW) and page.get(key, 0.0) < value - 1e-9:
                self.fallen.append(f"{key[0]} {dict(key[1])}: {value} -> {page.get(key)}")
        self._last = page
        self.pages += 1
