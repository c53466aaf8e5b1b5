"""What becomes of a request whose attempt has failed: who is asked next, and whether anybody is."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from citadel_gateway.app import failover
from citadel_gateway.app.clocks import Clocks
from citadel_gateway.app.journey import Journey
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.rescue import Rescue, is_worth_continuing
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.config.schema import LoadBalancerConfig
from citadel_gateway.config.values import RetryAmbiguous
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.metrics import Metrics
from citadel_gateway.policy.retry import Retry, RetryBudget


@attrs.define(eq=False, kw_only=True)
class Retrying:
    """Decides after failures.

    :param draw: returns a number from 0 to 1, for pauses.
    :param budget: shared by all requests, and by the configurations that follow each other.
    """

    balancer: LoadBalancer
    clocks: Clocks
    metrics: Metrics
    draw: Callable[[], float]
    budget: RetryBudget = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        balancing = self._balancing
        self.budget = RetryBudget(balancing.retry_budget_ratio, balancing.retry_budget_floor)

    @property
    def _balancing(self) -> LoadBalancerConfig:
        return self.balancer.config.load_balancer

    def may_go_on(self, journey: Journey, upstream: Upstream, failure: UpstreamFailure) -> bool:
        """Whether to ask somebody else after *failure*; if so, the journey is set on its way."""
        job, now = journey.job, trio.current_time()
        journey.note_work(failure)
        if failure.committed:
            if self._may_continue(journey, upstream, failure, now):
                return True
            self.metrics.continued(upstream.endpoint.model, "none")
            return False
        if now >= job.deadline:
            return False
        journey.failure = journey.cause(failure)
        if failure.stale:
            return self._may_go_on_after_stale(journey, upstream, now)
        if job.record.attempts >= self._balancing.max_attempts:
            return False
        if journey.refuses_usage(failure):
            upstream.asks_usage = False  # once more, with what it understands
            journey.aim_again(upstream)
            return True
        if journey.rescue is not None and journey.rescue.may_replay_instead(upstream, failure):
            journey.aim()
            return self._can_afford(failure, now)
        if failure.error.code == "context_length_exceeded":
            journey.keep_only(self.balancer.larger_contexts(upstream.endpoint.model, journey.later))
            return bool(journey.later) and self._can_afford(failure, now) and journey.next_group()
        match failure.judgement.retry:
            case Retry.NEVER:
                return False
            case Retry.AMBIGUOUS if not self._may_repeat(journey):
                return False
        journey.tried.add(upstream.endpoint)
        if journey.has_somewhere_to_go(now):
            self._wait_for_either(journey, failure, now)
        elif not self._may_wait(journey, failure):
            return False
        journey.aim()
        return self._can_afford(failure, now)

    def _wait_for_either(self, journey: Journey, failure: UpstreamFailure, now: float) -> None:
        """While all others are full, have whoever is ready first: one of them, or who rests.

        The last attempt is for one that has not refused yet.
        """
        group, tried = journey.group, journey.tried
        rests = failover.resting(failure, tried, group.upstreams, now)
        if not rests or journey.job.record.attempts + 1 >= self._balancing.max_attempts:
            return
        if group.is_any_left(tried, now) and not group.has_room(tried, now):
            tried.difference_update(rests)

    def _may_wait(self, journey: Journey, failure: UpstreamFailure) -> bool:
        """Whether to ask those once more that have asked to be left alone, when they have been."""
        job, tried = journey.job, journey.tried
        journey.pause = failover.rest(
            failure, tried, journey.group.upstreams, job.record.attempts, job.deadline, self.draw
        )
        if journey.pause is None:
            return False
        tried.difference_update(journey.pause.rests)
        return True

    def _may_continue(
        self, journey: Journey, upstream: Upstream, failure: UpstreamFailure, now: float
    ) -> bool:
        """Whether somebody else may go on with a stream of which the client has some already."""
        job, delivered, endpoint = journey.job, journey.delivered, upstream.endpoint
        if (
            delivered is None
            or not is_worth_continuing(failure)
            or job.record.attempts >= self._balancing.max_attempts
        ):
            return False
        rescue = Rescue(job.request, delivered, failure)
        journey.rescue, journey.failure = rescue, failure
        journey.tried |= {endpoint, *rescue.unfit(journey.group, endpoint.model)}
        journey.keep_only(())
        journey.repeated = False
        journey.aim()
        # A stream that has begun has left its deadline behind; its next token is due as the first.
        model = self.balancer.models[endpoint.model].config
        end = job.record.began + self.clocks.total(model.timeouts)
        journey.job = attrs.evolve(job, deadline=min(end, now + job.allowed))
        return journey.has_somewhere_to_go(now) and self._can_afford(failure, now)

    def _may_go_on_after_stale(self, journey: Journey, upstream: Upstream, now: float) -> bool:
        """A connection that had been idle is dead: no fault of the request, nor of the endpoint.

        It may have been executed all the same, so it is repeated once: elsewhere if that can be
        afforded, else over a new connection to the same endpoint.  Elsewhere is also the fallback:
        an engine that resets every request looks like this for as long as there are connections.
        """
        if not self._may_repeat(journey):
            return False
        tried = {*journey.tried, upstream.endpoint}
        elsewhere = bool(journey.groups) or journey.group.is_any_left(tried, now)
        if elsewhere and self.budget.withdraw(now):
            journey.tried = tried
            journey.aim()
        else:
            journey.aim_again(upstream)
        journey.needs_fresh = True
        return True

    def _can_afford(self, failure: UpstreamFailure, now: float) -> bool:
        """Whether there is budget for a retry; if not, the client had better not retry either."""
        if self.budget.withdraw(now):
            return True
        failure.error.should_retry = False
        return False

    def _may_repeat(self, journey: Journey) -> bool:
        """Whether a request that may have been executed may be sent once more."""
        allowed = self._balancing.retry_ambiguous is RetryAmbiguous.STATELESS
        if not allowed or journey.repeated or not journey.job.request.stateless:
            return False
        journey.repeated = True
        return True
