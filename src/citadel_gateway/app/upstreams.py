"""Models, the endpoints that serve them, and how to speak to each."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from citadel_gateway.config.schema import EndpointConfig, ModelConfig
from citadel_gateway.config.values import Capability, Engine
from citadel_gateway.io.health_monitoring import Probe
from citadel_gateway.io.target import Target
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.hedging import Hedging
from citadel_gateway.policy.quorum import Quorum
from citadel_gateway.wire.openai_request import InferenceRequest, Kind

_CAPABILITY = {
    Kind.CHAT: Capability.CHAT,
    Kind.COMPLETIONS: Capability.COMPLETIONS,
    Kind.EMBEDDINGS: Capability.EMBEDDINGS,
}


@attrs.frozen(kw_only=True)
class Numbers:
    """What a configuration says about an endpoint, which may be older than it."""

    weight: float
    max_concurrent: int
    cost: float | None
    floor: int | None  # of an adaptive limit, if it has one


@attrs.frozen
class Place:
    """Where an endpoint is, and what the configuration says of it.

    :param name: its URL, and behind it, in brackets, which of those it is that the URL stands for.
    :param address: the only one of its host's addresses to go to.
    :param is_stood_in_for: others are used because all of its priority are down.
    """

    name: str
    config: EndpointConfig
    address: str | None = None
    is_stood_in_for: bool = False


@attrs.define(eq=False)
class Upstream:
    """An endpoint and how to speak to it."""

    place: Place
    endpoint: Endpoint
    target: Target
    probe: Probe
    numbers: Numbers
    engine: Engine = Engine.AUTO
    hedging: Hedging | None = None  # its model's, if that is hedged
    asks_usage: bool = True  # until it has refused `stream_options`

    @property
    def known_engine(self) -> Engine:
        """What it is configured to be, else what it says that it is."""
        if self.engine is Engine.AUTO and self.endpoint.engine:
            return Engine(self.endpoint.engine)
        return self.engine

    def is_deaf(self, kind: Kind) -> bool:
        """Whether it does not hear the client of a whole answer hang up, and works on.

        llama.cpp writes nothing before the end, and listens only when it writes.
        """
        return self.known_engine is Engine.LLAMACPP and kind is not Kind.EMBEDDINGS


@attrs.define(eq=False)
class Model:
    """A model that clients can ask for."""

    id: str
    config: ModelConfig
    quorum: Quorum
    upstreams: list[Upstream] = attrs.field(factory=list, init=False)
    hedging: Hedging | None = attrs.field(default=None, init=False)
    _begun: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        if self.config.hedge:
            self.hedging = Hedging(self.config.hedge_after)

    def begin(self, previous: Model | None = None) -> None:
        """Mind how many of the endpoints are well, as *previous* has done until now."""
        endpoints = [upstream.endpoint for upstream in self.upstreams]
        if previous is not None:
            if self.hedging is not None and previous.hedging is not None:
                self.hedging.take_over(previous.hedging)
            previous.quorum.renew(self.quorum, endpoints)
            self.quorum = previous.quorum
        else:
            self.quorum.renew(self.quorum, endpoints)
        self._begun = True

    def end(self) -> None:
        """There is no such model any more."""
        for upstream in self.upstreams:
            self.quorum.remove(upstream.endpoint)

    def add(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams += upstreams
        if self._begun:
            for upstream in upstreams:
                self.quorum.add(upstream.endpoint)

    def remove(self, upstream: Upstream) -> None:
        self.upstreams.remove(upstream)
        if self._begun:
            self.quorum.remove(upstream.endpoint)

    def replace(self, upstream: Upstream) -> None:
        """Speak to an endpoint that is there in another way."""
        i = next(i for i, u in enumerate(self.upstreams) if u.endpoint is upstream.endpoint)
        self.upstreams[i] = upstream

    def can_answer(self, request: InferenceRequest) -> bool:
        return _CAPABILITY[request.kind] in self.config.capabilities

    def can_hold(self, request: InferenceRequest) -> bool:
        """Whether prompt and answer fit its context, as far as can be told without a tokenizer."""
        window = self.config.context_window
        return window is None or tokens_needed(request) <= window


def tokens_needed(request: InferenceRequest) -> int:
    return request.prompt_tokens + (request.max_tokens or 1)
