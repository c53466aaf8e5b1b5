"""A stream that broke after its client had some of it, and who may go on with it, and how."""

from __future__ import annotations

import attrs

from citadel_gateway.app.group import Group
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.config.values import Engine
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.retry import Retry
from citadel_gateway.wire.continuation import Continuation, Prefill, Way, replay, resume
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.openai_request import InferenceRequest, Kind

_PREFILL = {
    # An engine that ignores the flags would begin anew, and nobody would see where.
    Engine.AUTO: Prefill.NONE,
    Engine.VLLM: Prefill.FLAGGED,
    Engine.SGLANG: Prefill.FLAGGED,
    Engine.TGI: Prefill.FLAGGED,
    # New ones want the flags, old ones do not know them; they all go by the last message.
    Engine.LLAMACPP: Prefill.FLAGGED,
    Engine.OLLAMA: Prefill.LAST_MESSAGE,
    Engine.OPENAI: Prefill.NONE,
}
_REFUSALS = frozenset({400, 404, 422, 501})


@attrs.define(eq=False)
class Rescue:
    """What is known about one broken stream.

    :param request: as the client sent it.
    :param failure: what broke the stream, and what the client is told if nobody can go on.
    """

    request: InferenceRequest
    delivered: Delivered
    failure: UpstreamFailure
    _refused: set[Endpoint] = attrs.field(factory=set, init=False)
    _known: dict[Prefill | None, Continuation | None] = attrs.field(factory=dict, init=False)

    def continuation(self, upstream: Upstream) -> Continuation | None:
        """What to send to *upstream*; ``None`` if it cannot go on."""
        style = self._style(upstream)
        if style not in self._known:
            resumed = None if style is None else resume(self.request, self.delivered, style)
            self._known[style] = resumed or replay(self.request, self.delivered)
        return self._known[style]

    def unfit(self, group: Group, model: str) -> set[Endpoint]:
        """Those of *group* that cannot go on: another model would be another author."""
        return {
            endpoint
            for endpoint, upstream in group.upstreams.items()
            if endpoint.model != model or self.continuation(upstream) is None
        }

    def may_replay_instead(self, upstream: Upstream, failure: UpstreamFailure) -> bool:
        """Whether *failure* is a refusal to be resumed, and *upstream* may replay the request.

        Who began anew was sent the request as it is, and would only be sent it once more.
        """
        asked = self.continuation(upstream)
        if (
            asked is None
            or asked.way is Way.REPLAY
            or asked.is_anew
            or failure.error.status not in _REFUSALS
        ):
            return False
        self._refused.add(upstream.endpoint)
        return self.continuation(upstream) is not None

    def _style(self, upstream: Upstream) -> Prefill | None:
        """``None`` if it cannot be resumed in any way."""
        if upstream.endpoint in self._refused:
            return None
        if self.request.kind is Kind.COMPLETIONS and upstream.known_engine is Engine.OLLAMA:
            return None  # it takes a prompt for a message of the user's
        return _PREFILL[upstream.known_engine]


def is_worth_continuing(failure: UpstreamFailure) -> bool:
    """Whether another endpoint may do better: not if the request or its time is at fault."""
    never = failure.judgement.retry is Retry.NEVER
    return failure.committed and not never and failure.error.code != "timeout_total"
