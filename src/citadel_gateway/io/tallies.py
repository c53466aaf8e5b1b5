"""Counters and histograms that cost next to nothing until somebody scrapes them.

``prometheus_client``'s own take a lock for each number and walk through the buckets one by one,
and a request updates a dozen of them.  Here one event loop counts in plain dictionaries, and the
library's families are made when they are collected.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import attrs
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


@attrs.define(eq=False)
class Counts(Collector):
    """A family of counters, one for each combination of label values that was ever counted."""

    name: str
    documentation: str
    labels: Labels = ()
    _values: dict[Labels, float] = attrs.field(factory=dict, init=False)

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self.name, self.documentation, labels=self.labels)
        for labels, value in list(self._values.items()):  # may be another thread's: one step
            family.add_metric(labels, value)
        yield family


@attrs.define(eq=False)
class _Cell:
    counts: list[int]
    total: float = 0.0


@attrs.define(eq=False)
class Distributions(Collector):
    """A family of histograms with the upper *bounds* of their buckets, infinity not among them."""

    name: str
    documentation: str
    bounds: tuple[float, ...]
    labels: Labels = ()
    _cells: dict[Labels, _Cell] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        if not self.labels:
            self._cells[()] = self._make_cell()

    def observe(self, labels: Labels, value: float) -> None:
        cell = self._cells.get(labels)
        if cell is None:
            cell = self._cells[labels] = self._make_cell()
        cell.counts[bisect_left(self.bounds, value)] += 1
        cell.total += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.labels)
        names = [*map(floatToGoString, self.bounds), "+Inf"]
        for labels, cell in list(self._cells.items()):
            buckets, so_far = [], 0
            for name, count in zip(names, cell.counts, strict=True):
                so_far += count
                buckets.append((name, float(so_far)))
            family.add_metric(labels, buckets, cell.total)
        yield family

    def _make_cell(self) -> _Cell:
        return _Cell([0] * (len(self.bounds) + 1))
