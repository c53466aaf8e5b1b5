"""How long a request, and each attempt at it, may take by the configuration.

Reading a prompt takes an engine time in proportion to its length, and a stream says nothing before.
So the clock of the first token may be given seconds for every thousand tokens of the prompt, as
estimated.  The request's own deadline gets as many on top, as else it would strike first; not the
one that a client has named.
"""

from __future__ import annotations

import math

import attrs

from citadel_gateway.app.journey import Job
from citadel_gateway.config.schema import GatewayConfigSchema, TimeoutsConfig
from citadel_gateway.io.target import Timing

_CONNECT = 2.0
_IDLE = 20.0


class Clocks:
    """The clocks of one configuration: what a model says, else what is said for all.

    :ivar allow_for_prompts: some model gives time for its prompts, so that anybody need ask how
        much.
    """

    def __init__(self, config: GatewayConfigSchema) -> None:
        self._shared = config.performance.timeouts
        timeouts = [model.timeouts for model in config.models.values()]
        self.allow_for_prompts = any(self._per_1k_tokens(own) for own in timeouts)

    def timing(self, job: Job, own: TimeoutsConfig) -> Timing:
        """Of one attempt at *job*, at a model with its *own* clocks."""
        shared = self._shared
        first_token = own.first_token or shared.first_token or math.inf
        if self.allow_for_prompts:
            first_token += self._per_1k_tokens(own) * job.request.prompt_tokens / 1000
        return Timing(
            connect=own.connect or shared.connect or _CONNECT,
            headers=own.headers or shared.headers or math.inf,
            first_token=first_token,
            idle=own.idle or shared.idle or _IDLE,
            total=self.total(own),
            deadline=job.deadline,
            allowed=job.allowed,
            shortened=job.shortened,
        )

    def total(self, own: TimeoutsConfig) -> float:
        """Of a whole stream, from its request's arrival."""
        return own.total or self._shared.total or math.inf

    def with_time_for_prompt(self, job: Job) -> Job:
        """*job* with as much more time as the slowest reader of those it may go to gets."""
        models = [model.config.timeouts for group in job.plan.groups for model in group.models]
        slowest = max(self._per_1k_tokens(own) for own in models)
        extra = slowest * job.request.prompt_tokens / 1000
        allowed = min(job.allowed + extra, max(job.allowed, job.longest))
        return attrs.evolve(
            job,
            deadline=job.deadline + allowed - job.allowed,
            allowed=allowed,
            shortened=job.longest <= allowed,
        )

    def _per_1k_tokens(self, own: TimeoutsConfig) -> float:
        said = own.first_token_per_1k_tokens
        return (self._shared.first_token_per_1k_tokens if said is None else said) or 0.0
