"""Pages of metrics, added up: what several workers count is what the gateway counts.

Pages are in Prometheus's text format, version 0.0.4, as `io.metrics` writes them: the head of a
family, and then its samples, one a line.  Counters and histograms only ever grow.  So what a
worker has counted stays in the sums when it has gone, and when it begins again from zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import attrs

Samples: TypeAlias = dict[str, float]
"""By name and labels, as they are written."""

_KEPT = frozenset({"counter", "histogram"})
_OWNER = re.compile(r'(endpoint|model)="((?:[^"\\]|\\.)*)"')
_DRAINING = "citadel_gateway_draining"

# Gauges that do not add up.  They are about workers that take requests, if there are any.
_RULES: dict[str, Callable[[Iterable[float]], float]] = {
    "citadel_gateway_endpoint_healthy": min,
    "citadel_gateway_endpoint_slow_start_share": min,
    "citadel_gateway_endpoint_cordoned": max,
    "citadel_gateway_endpoint_latency_seconds": max,
    "citadel_gateway_breaker_state": max,
    "citadel_gateway_panic": max,
    "citadel_gateway_source_failing": max,
    "citadel_gateway_overload_level": max,
    "citadel_gateway_store_up": min,
    "citadel_gateway_store_members": max,
    "citadel_gateway_queue_predicted_wait_seconds": max,
    "citadel_gateway_config_generation": max,
    "citadel_gateway_config_generations": max,
    "citadel_gateway_config_timestamp_seconds": min,
    "citadel_gateway_config_refused": max,
    _DRAINING: min,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
# Gauges that add up over workers that take requests: others keep what they have to themselves.
_OFFERS = frozenset({"citadel_gateway_endpoint_max_concurrent", "citadel_gateway_endpoint_limit"})
# Called gauges for the sake of their names; they count since the start.
_COUNTS = frozenset({"citadel_gateway_log_lines_dropped"})


@attrs.define
class Family:
    name: str
    head: str
    is_kept: bool
    samples: Samples = attrs.field(factory=dict)


Page: TypeAlias = dict[str, Family]


def parse_page(text: str) -> Page:
    """The families of a page that `io.metrics` has made."""
    page: Page = {}
    samples: Samples = {}
    help_ = ""
    for line in text.split("\n"):
        if line.startswith("# HELP "):
            help_ = line
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            kept = kind in _KEPT or name in _COUNTS
            family = page[name] = Family(name, f"{help_}\n{line}\n", kept)
            samples = family.samples
        elif line:
            key, _, value = line.rpartition(" ")
            samples[key] = float(value)
    return page


@attrs.define
class HostPage:
    """The page of a whole host.

    :param whole: gauges of which every worker tells what is true for all together.
    :param remembers: seconds that counts are kept of endpoints and models that no worker knows.
    """

    whole: frozenset[str] = frozenset()
    remembers: float = 300.0
    _pages: dict[int, Page] = attrs.field(factory=dict, init=False)
    _unread: dict[int, str] = attrs.field(factory=dict, init=False)
    _gone: Page = attrs.field(factory=dict, init=False)
    _absent: dict[tuple[str, str], float] = attrs.field(factory=dict, init=False)

    def take(self, source: int, text: str, *, is_whole: bool = True) -> None:
        """The latest page of *source*; it replaces the one before.

        One that is not whole leaves families as they were that are not on it.  It is read when it
        is needed, which most are not: another one comes before.
        """
        if is_whole:
            self._unread.pop(source, None)
            self._replace(source, parse_page(text))
        else:
            self._unread[source] = text

    def _read(self, source: int) -> None:
        if (text := self._unread.pop(source, None)) is not None:
            self._replace(source, {**self._pages.get(source, {}), **parse_page(text)})

    def _replace(self, source: int, page: Page) -> None:
        for name, family in self._pages.get(source, {}).items():
            if not family.is_kept:
                continue
            now = page[name].samples if name in page else {}
            for key, value in family.samples.items():
                if now.get(key, -1.0) < value:
                    self._keep(family, key, value)
        self._pages[source] = page

    def leave(self, source: int) -> None:
        """There will be no more pages of *source*; what it has counted stays."""
        self._read(source)
        for family in self._pages.pop(source, {}).values():
            if family.is_kept:
                for key, value in family.samples.items():
                    self._keep(family, key, value)

    def pieces(self) -> Iterator[str]:
        """The text, a family at a time."""
        for source in [*self._unread]:
            self._read(source)
        taking = [page for page in self._pages.values() if not _is_draining(page)]
        taking = taking or [*self._pages.values()]
        everybody = [self._gone, *self._pages.values()]
        names = dict.fromkeys(name for page in reversed(everybody) for name in page)
        for name in names:
            rule = max if name in self.whole else _RULES.get(name)
            pages = taking if rule is not None or name in _OFFERS else everybody
            families = [page[name] for page in pages if name in page]
            if families:
                yield families[-1].head + _text(_merged(families, rule))

    def forget_absent(self, now: float) -> None:
        """Drop what is left of endpoints and models that no worker has known for a while."""
        left = {key: _owners(key) for family in self._gone.values() for key in family.samples}
        if not any(left.values()):
            return
        known = {
            owner
            for page in self._pages.values()
            for family in page.values()
            for key in family.samples
            for owner in _owners(key)
        }
        absent = set().union(*left.values()) - known
        self._absent = {owner: self._absent.get(owner, now) for owner in absent}
        over = {owner for owner, since in self._absent.items() if now - since >= self.remembers}
        for family in self._gone.values():
            for key in [key for key in family.samples if not over.isdisjoint(left.get(key, ()))]:
                del family.samples[key]

    def _keep(self, family: Family, key: str, value: float) -> None:
        kept = self._gone.get(family.name)
        if kept is None:
            kept = self._gone[family.name] = Family(family.name, family.head, is_kept=True)
        kept.samples[key] = kept.samples.get(key, 0.0) + value


def _owners(key: str) -> list[tuple[str, str]]:
    """The endpoint and the model of which a sample tells, also by OpenTelemetry's name of it."""
    return [(kind, value) for kind, value in _OWNER.findall(key) if value != "none"]


def _is_draining(page: Page) -> bool:
    return _DRAINING in page and any(page[_DRAINING].samples.values())


def _merged(families: list[Family], rule: Callable[[Iterable[float]], float] | None) -> Samples:
    if len(families) == 1:
        return families[0].samples
    keys = dict.fromkeys(key for family in families for key in family.samples)
    merged: Samples = {}
    for key in keys:
        values = [family.samples[key] for family in families if key in family.samples]
        merged[key] = sum(values) if rule is None else rule(values)
    return merged


def _text(samples: Samples) -> str:
    return "".join([f"{key} {value!r}\n" for key, value in samples.items()])
