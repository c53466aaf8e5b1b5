"""Which requests go wrong, and how.  Pure: it chooses, others act.

Kinds that replace the answer (:data:`CANNED`), and ``hang``, work on any path a fault names; the
others happen while a completion is made.  A whole answer has no middle, so there they come out as
the nearest thing; :mod:`citadel_gateway.sim.whole` says which.  ``/sim/`` itself never fails.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable
from typing import Any

import attrs
from attrs import validators as check


class FaultStruck(Exception):
    """The request is over because its fault said so; nothing more is to be sent."""


class AbortConnection(FaultStruck):
    """Close the connection as it is, without the end of the body.

    Leaves the ASGI call, so that the server does it.
    """


class FaultKind(enum.StrEnum):
    ERROR = "error"  # `status` with OpenAI's error body
    VLLM_ERROR = "vllm_error"  # `status` with the body of older vLLMs: {"object": "error", ...}
    RATE_LIMIT = "rate_limit"  # 429 with Retry-After
    OVERLOADED = "overloaded"  # 503 with Retry-After
    LOADING = "loading"  # 503, on /health and /v1/models too
    HANG = "hang"  # no response head for `delay` seconds; 0: never
    HTML = "html"  # 200 with a web page
    NOT_JSON = "not_json"  # 200, said to be JSON, and it is not
    EMPTY = "empty"  # 200 without a body
    REDIRECT = "redirect"  # 307 to another place
    HALF_BODY = "half_body"  # content-length promises twice what comes; then the connection closes
    SLOW_FIRST_TOKEN = "slow_first_token"  # noqa: S105 - head at once, then `delay` seconds
    STALL = "stall"  # silence after `after_tokens` for `delay` seconds; 0: for ever
    CUT = "cut"  # the connection is closed after `after_tokens`
    CLEAN_CUT = "clean_cut"  # a tidy end after `after_tokens`: no finish_reason, no [DONE]
    NO_DONE = "no_done"  # complete but for [DONE]
    ERROR_EVENT = "error_event"  # data: {"error": ...} after `after_tokens`, then [DONE], as vLLM
    MALFORMED_EVENT = "malformed_event"  # one event of broken JSON after `after_tokens`


CANNED = frozenset(
    {
        FaultKind.ERROR, FaultKind.VLLM_ERROR, FaultKind.RATE_LIMIT, FaultKind.OVERLOADED,
        FaultKind.LOADING, FaultKind.HTML, FaultKind.NOT_JSON, FaultKind.EMPTY,
        FaultKind.REDIRECT, FaultKind.HALF_BODY,
    }
)  # fmt: skip

COMPLETION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
WORK_PATHS = COMPLETION_PATHS | {"/v1/embeddings"}
_LOADING_PATHS = WORK_PATHS | {"/health", "/v1/models"}

_not_bool = check.not_(check.instance_of(bool))
_number: list[Any] = [check.instance_of((int, float)), _not_bool, check.ge(0)]
_whole: list[Any] = [check.instance_of(int), _not_bool, check.ge(0)]
_names = check.deep_iterable(check.instance_of(str), check.instance_of(tuple))


def _as_tuple(names: Any) -> Any:
    return tuple(names) if isinstance(names, list) else names


@attrs.frozen
class Fault:
    """A way to go wrong and the requests it is for.

    :param after_tokens: steps of a stream that come first; never more than it has.
    :param count: how many requests get it; ``None`` for no end.
    :param rate: the share of matching requests that get it.
    :param delay: seconds; before the fault's answer, unless the kind says otherwise.
    :param models: only requests naming one of these; empty for all.
    :param paths: only these paths; empty for the three that do work.
    """

    kind: FaultKind = attrs.field(converter=FaultKind)
    after_tokens: int = attrs.field(default=0, validator=_whole, kw_only=True)
    count: int | None = attrs.field(default=None, validator=check.optional(_whole), kw_only=True)
    rate: float = attrs.field(default=1.0, validator=[*_number, check.le(1)], kw_only=True)
    status: int = attrs.field(
        default=500, validator=[*_whole, check.ge(400), check.lt(600)], kw_only=True
    )
    delay: float = attrs.field(default=0.0, validator=_number, kw_only=True)
    retry_after: float = attrs.field(default=1.0, validator=_number, kw_only=True)
    models: tuple[str, ...] = attrs.field(
        default=(), converter=_as_tuple, validator=_names, kw_only=True
    )
    paths: tuple[str, ...] = attrs.field(
        default=(), converter=_as_tuple, validator=_names, kw_only=True
    )

    def matches(self, path: str, model: str | None) -> bool:
        usual = _LOADING_PATHS if self.kind is FaultKind.LOADING else WORK_PATHS
        if path not in (self.paths or usual) or path.startswith("/sim/"):
            return False
        if path not in COMPLETION_PATHS and self.kind not in CANNED | {FaultKind.HANG}:
            return False
        return not self.models or model is None or model in self.models


@attrs.define(eq=False)
class Faults:
    """The faults in force, in order; the first that matches and wins its toss is taken."""

    _rng: random.Random
    _active: list[Fault] = attrs.field(factory=list)

    def replace(self, faults: Iterable[Fault]) -> None:
        self._active = list(faults)

    def clear(self) -> None:
        self._active.clear()

    def choose(self, path: str, model: str | None = None) -> Fault | None:
        """The fault of this request, which uses up one of its count.

        Asking after the engine's health uses up none, so that a probe changes nothing.
        """
        for at, fault in enumerate(self._active):
            if fault.count == 0 or not fault.matches(path, model):
                continue
            if fault.rate < 1 and self._rng.random() >= fault.rate:
                continue
            if fault.count is not None and (path in WORK_PATHS or path in fault.paths):
                self._active[at] = attrs.evolve(fault, count=fault.count - 1)
            return fault
        return None

    def as_json(self) -> list[dict[str, Any]]:
        """The faults with what is left of their counts."""
        return [attrs.asdict(fault) for fault in self._active]


def parse_faults(raw: Any) -> list[Fault]:
    """Faults from a JSON list; raises ValueError or TypeError saying what is wrong."""
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise ValueError("expected a list of objects")
    return [Fault(**item) for item in raw]
