"""What one attempt tells about how much its endpoint can take at once."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.policy.adaptive import Kind, Sample
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.endpoint import Endpoint

_TOO_SLOW = frozenset({"timeout_headers", "timeout_first_token", "timeout_total"})
_NO_ROOM = frozenset({429, 503})


@attrs.define(eq=False)
class Measurement:
    """Of an attempt at an endpoint whose limit adapts.

    :param began: when it was sent.
    :param in_flight: requests that were with the endpoint then, itself included.
    :param prompt_tokens: of its prompt, about.
    :param on_room: told when the endpoint may take more than before.
    """

    endpoint: Endpoint
    began: float
    in_flight: int
    prompt_tokens: int
    on_room: Callable[[], None]

    def first_token(self, now: float) -> None:
        self._tell(Kind.STREAM, self.prompt_tokens, now)

    def whole(self, completion_tokens: int, now: float) -> None:
        """Embeddings, for one, have no tokens of their own, and take as long as their input."""
        self._tell(Kind.WHOLE, completion_tokens or self.prompt_tokens, now)

    def failed(self, failure: UpstreamFailure, now: float) -> None:
        """Learn from a refusal for want of room, or from a clock that was not the client's own."""
        error = failure.error
        if error.code in _TOO_SLOW:
            if failure.judgement.verdict is Verdict.BAD:
                self._tell(Kind.TIMED_OUT, 0, now)
        elif error.status in _NO_ROOM and error.code != "gateway_exhausted":
            self._tell(Kind.REFUSED, 0, now)

    def _tell(self, kind: Kind, size: int, now: float) -> None:
        sample = Sample(
            kind=kind,
            size=size,
            seconds=now - self.began,
            began=self.began,
            in_flight=max(self.in_flight, self.endpoint.in_flight),
        )
        if self.endpoint.measured(sample, now):
            self.on_room()
