"""Counters and histograms of one event loop, and their text for Prometheus.

Unlike those of prometheus_client they need no lock, can be rendered a piece at a time, so that
nobody waits for a page with thousands of lines, and keep the text in front of each value.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import attrs
from prometheus_client.utils import floatToGoString


@attrs.define(eq=False)
class Count:
    """One series of a counter."""

    prefix: str
    value: float = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


@attrs.define(eq=False)
class Distribution:
    """One labelled histogram."""

    bounds: Sequence[float]
    counts: list[int]
    total: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """A family of counters; *name* is without its ``_total``."""

    def __init__(self, name: str, doc: str, labels: Sequence[str] = ()) -> None:
        self.name, self.doc, self.label_names = f"{name}_total", doc, tuple(labels)
        self._children: dict[tuple[str, ...], Count] = {}

    def labels(self, *values: str) -> Count:
        child = self._children.get(values)
        if child is None:
            prefix = f"{self.name}{label_text(self.label_names, values)} "
            child = self._children[values] = Count(prefix)
        return child

    def values_of(self, label: str) -> set[str]:
        """The values that *label* has in any series."""
        place = self.label_names.index(label)
        return {values[place] for values in self._children}

    def forget(self, label: str, value: str) -> None:
        """Drop the series in which *label* is *value*."""
        place = self.label_names.index(label)
        for values in [v for v in self._children if v[place] == value]:
            del self._children[values]

    def pieces(self) -> Iterator[str]:
        yield head(self.name, self.doc, "counter")
        for child in list(self._children.values()):
            yield f"{child.prefix}{number(child.value)}\n"


class Histograms:
    """A family of histograms.

    :param also: OpenTelemetry's name of the family, and of its labels: the same numbers once more.
    """

    def __init__(
        self,
        name: str,
        doc: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        also: tuple[str, Sequence[str]] | None = None,
    ) -> None:
        self._bounds, self.label_names = tuple(buckets), tuple(labels)
        self._children: dict[tuple[str, ...], Distribution] = {}
        self._views = [_View(name, doc, labels, self._bounds)]
        if also is not None:
            doc = f"{doc} (OpenTelemetry's name)"
            self._views.append(_View(also[0], doc, also[1], self._bounds))

    def labels(self, *values: str) -> Distribution:
        child = self._children.get(values)
        if child is None:
            counts = [0] * (len(self._bounds) + 1)
            child = self._children[values] = Distribution(self._bounds, counts)
        return child

    def values_of(self, label: str) -> set[str]:
        """The values that *label* has in any series."""
        place = self.label_names.index(label)
        return {values[place] for values in self._children}

    def forget(self, label: str, value: str) -> None:
        """Drop the series in which *label* is *value*."""
        place = self.label_names.index(label)
        for values in [v for v in self._children if v[place] == value]:
            del self._children[values]
            for view in self._views:
                view.forget(values)

    def pieces(self) -> Iterator[str]:
        for view in self._views:
            yield head(view.name, view.doc, "histogram")
            for values, child in list(self._children.items()):
                yield view.text(values, child)


class _View:
    def __init__(
        self, name: str, doc: str, label_names: Sequence[str], bounds: Sequence[float]
    ) -> None:
        self.name, self.doc, self._label_names = name, doc, label_names
        self._edges: list[str] = [
            floatToGoString(bound)  # type: ignore[no-untyped-call]
            for bound in (*bounds, math.inf)
        ]
        self._prefixes: dict[tuple[str, ...], list[str]] = {}

    def forget(self, values: tuple[str, ...]) -> None:
        self._prefixes.pop(values, None)

    def text(self, values: tuple[str, ...], child: Distribution) -> str:
        prefixes = self._prefixes.get(values) or self._make_prefixes(values)
        lines, below = [], 0
        for prefix, count in zip(prefixes, child.counts, strict=False):
            below += count
            lines.append(f"{prefix}{below}.0\n")
        lines.append(f"{prefixes[-2]}{below}.0\n{prefixes[-1]}{number(child.total)}\n")
        return "".join(lines)

    def _make_prefixes(self, values: tuple[str, ...]) -> list[str]:
        names, plain = (*self._label_names, "le"), label_text(self._label_names, values)
        prefixes = [
            f"{self.name}_bucket{label_text(names, (*values, edge))} " for edge in self._edges
        ]
        prefixes += [f"{self.name}_count{plain} ", f"{self.name}_sum{plain} "]
        self._prefixes[values] = prefixes
        return prefixes


def head(name: str, doc: str, kind: str) -> str:
    return f"# HELP {name} {doc}\n# TYPE {name} {kind}\n"


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """``{a="1",b="2"}`` in the order of the names, as ever; nothing without labels."""
    if not names:
        return ""
    pairs = sorted(zip(names, values, strict=True))
    inside = ",".join(f'{name}="{_escape(value)}"' for name, value in pairs)
    return f"{{{inside}}}"


def number(value: float) -> str:
    return repr(float(value))


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
