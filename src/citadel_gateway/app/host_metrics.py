"""The metrics of all workers of a host, and the supervisor's own."""

from __future__ import annotations

import attrs
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest

from citadel_gateway.io.series import Counters, head, number
from citadel_gateway.wire.exposition import HostPage

_OWN = 0  # no process has this number
_FORGET = 30.0
_CAPS = frozenset({"citadel_gateway_endpoint_max_concurrent"})


def _process() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@attrs.define(eq=False)
class HostMetrics:
    """Adds up.

    No page of a worker is needed for another one, so whoever is silent costs only that its numbers
    are older.

    :param has_store: workers share their caps, and so each tells the whole.
    """

    has_store: bool = False
    _pages: HostPage = attrs.field(init=False)
    _process: CollectorRegistry = attrs.field(factory=_process, init=False)
    _deaths: Counters = attrs.field(init=False)
    _reloads: Counters = attrs.field(init=False)
    _forget_at: float = attrs.field(default=0.0, init=False)
    _levels: dict[str, tuple[str, float]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._pages = HostPage(_CAPS if self.has_store else frozenset())
        self._deaths = Counters(
            "citadel_gateway_worker_deaths", "Workers that ended unasked, and were replaced."
        )
        self._deaths.labels()
        self._reloads = Counters(
            "citadel_gateway_config_reloads",
            "Times that the configuration was read again: taken, refused or crashed.",
            ["result"],
        )

    def take(self, source: int, text: str, *, is_whole: bool = True) -> None:
        self._pages.take(source, text, is_whole=is_whole)

    def leave(self, source: int) -> None:
        self._pages.leave(source)

    def died(self) -> None:
        self._deaths.labels().inc()

    def reloaded(self, result: str) -> None:
        self._reloads.labels(result).inc()

    def note_refusal(self, is_refusing: bool) -> None:
        text = "1 if the file was refused when last read."
        self._levels["citadel_gateway_config_refused"] = (text, is_refusing)

    def note_workers(self, wanted: int, ready: int) -> None:
        self._levels |= {
            "citadel_gateway_workers": ("Workers that should serve.", wanted),
            "citadel_gateway_workers_ready": ("Workers that serve.", ready),
        }

    def page(self, now: float) -> str:
        """What Prometheus scrapes."""
        self._pages.take(_OWN, self._own())
        if now >= self._forget_at:
            self._pages.forget_absent(now)
            self._forget_at = now + _FORGET
        return "".join(self._pages.pieces())

    def _own(self) -> str:
        pieces = [generate_latest(self._process).decode()]
        for name, (doc, value) in self._levels.items():
            pieces += [head(name, doc, "gauge"), f"{name} {number(value)}\n"]
        for family in (self._deaths, self._reloads):
            pieces += family.pieces()
        return "".join(pieces)
