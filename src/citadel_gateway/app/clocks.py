"""How long a request, and each attempt at it, may take by the configuration.

Reading a prompt takes an engine time in proportion to its length, and a stream says nothing before.
So the clock of the first token may be given seconds for every thousand tokens of the prompt, as
estimated.  The request's own deadline gets as many on top, as else it would strike first; not the
one that a client has named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from citadel_gateway.config.schema import GatewayConfigSchema, TimeoutsConfig
from citadel_gateway.io.target import Timing

_CONNECT = 2.0
_IDLE = 20.0


def timing(
    own: TimeoutsConfig,
    shared: TimeoutsConfig,
    *,
    prompt_tokens: int,
    deadline: float,
    allowed: float,
    shortened: bool,
) -> Timing:
    """The clocks of one attempt: what the model says, else what is said for all.

    :param prompt_tokens: 0 if no model allows for them.
    """
    first_token = own.first_token or shared.first_token or math.inf
    if prompt_tokens:
        first_token += _per_1k_tokens(own, shared) * prompt_tokens / 1000
    return Timing(
        connect=own.connect or shared.connect or _CONNECT,
        headers=own.headers or shared.headers or math.inf,
        first_token=first_token,
        idle=own.idle or shared.idle or _IDLE,
        total=own.total or shared.total or math.inf,
        deadline=deadline,
        allowed=allowed,
        shortened=shortened,
    )


def allows_for_prompts(config: GatewayConfigSchema) -> bool:
    """Whether any model gives time for its prompts, so that anybody need ask how much."""
    shared = config.performance.timeouts
    return any(_per_1k_tokens(model.timeouts, shared) for model in config.models.values())


def time_for_prompt(
    models: Iterable[TimeoutsConfig], shared: TimeoutsConfig, prompt_tokens: int
) -> float:
    """Seconds that the slowest reader among *models* gets for a prompt."""
    return max(_per_1k_tokens(own, shared) for own in models) * prompt_tokens / 1000


def _per_1k_tokens(own: TimeoutsConfig, shared: TimeoutsConfig) -> float:
    said = own.first_token_per_1k_tokens
    return (shared.first_token_per_1k_tokens if said is None else said) or 0.0
