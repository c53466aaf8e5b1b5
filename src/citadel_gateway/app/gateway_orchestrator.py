"""The centre of the gateway: a request finds a place, is sent, and if need be goes elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import attrs
import trio

from citadel_gateway.app.load_balancer import Group, LoadBalancer, Plan, Upstream
from citadel_gateway.app.measuring import Measurement
from citadel_gateway.config.schema import LoadBalancerConfig, TimeoutsConfig
from citadel_gateway.config.values import RetryAmbiguous
from citadel_gateway.errors import (
    GatewayError,
    all_cordoned,
    no_healthy_backend,
    queue_full,
    queue_timeout,
)
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.metrics import Metrics
from citadel_gateway.io.record import Phase, RequestRecord, is_our_finding
from citadel_gateway.io.stream_relay import Sink
from citadel_gateway.io.target import Call, Timing
from citadel_gateway.io.upstream import UpstreamClient, WholeAnswer
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.retry import Retry, RetryBudget
from citadel_gateway.policy.waitroom import Choice, Full, Nobody, Ticket
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.openai_request import InferenceRequest
from citadel_gateway.wire.openai_stream import StreamReader

_CONNECT = 2.0
_IDLE = 20.0


@attrs.frozen(kw_only=True)
class Job:
    """A request on its way through the gateway.

    :param deadline: in Trio's time; a whole answer or a first token is due by then.
    :param allowed: the same in seconds from its arrival, for messages.
    :param shortened: the client asked for that deadline by header.
    """

    request: InferenceRequest
    plan: Plan
    record: RequestRecord
    tracing: Headers
    deadline: float
    allowed: float
    shortened: bool


@attrs.define(eq=False)
class GatewayOrchestrator:
    """Takes jobs to endpoints.

    Everything a job holds is on its ticket, and the ticket is given back in one ``finally``.

    :param suspect: told of endpoints that could not be reached, so that they are probed at once.
    """

    balancer: LoadBalancer
    admission: Admission
    client: UpstreamClient
    metrics: Metrics
    suspect: Callable[[Endpoint], None]
    budget: RetryBudget = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        balancing = self._balancing
        self.budget = RetryBudget(balancing.retry_budget_ratio, balancing.retry_budget_floor)

    @property
    def _balancing(self) -> LoadBalancerConfig:
        return self.balancer.config.load_balancer

    async def answer(self, job: Job, sink: Sink) -> WholeAnswer | None:
        """Get *job* answered: a stream goes to *sink*, a whole answer is returned.

        Raises ``GatewayError`` when nobody could be asked, ``UpstreamFailure`` when the last one
        asked failed.
        """
        now = trio.current_time()
        self.budget.deposit(now)
        if not any(group.is_any_left((), now) for group in job.plan.groups):
            first = job.plan.groups[0]  # to queue for it would only delay the bad news
            raise _nobody_in(first, first.next_chance(now))
        journey = _Journey(job, list(job.plan.groups))
        ticket = journey.ticket
        try:
            self.admission.enter(ticket)
        except Full:
            wait = self.admission.waitroom.retry_after(ticket.queue)
            raise queue_full(ticket.queue, wait) from None
        verdict = Verdict.NO_OPINION
        try:
            while True:
                upstream = await self._find_place(journey)
                try:
                    answer = await self._attempt(upstream, journey, sink)
                except UpstreamFailure as failure:
                    verdict = failure.judgement.verdict
                    self._learn(upstream, failure)
                    if not self._may_go_on(journey, upstream, failure):
                        raise
                    self.admission.move(ticket, verdict)
                    verdict = Verdict.NO_OPINION
                else:
                    verdict = Verdict.GOOD
                    return answer
        finally:
            self.admission.leave(ticket, verdict)

    async def _find_place(self, journey: _Journey) -> Upstream:
        """Wait for a slot on an endpoint of the current group, else of the next one."""
        ticket, record = journey.ticket, journey.job.record
        while True:
            await self._wait_for_slot(journey)
            match ticket.outcome:
                case Slot(endpoint=endpoint):
                    record.model, record.endpoint = endpoint.model, endpoint.url
                    return journey.group.upstreams[endpoint]
                case Nobody(retry_after=wait) if not journey.next_group():
                    if journey.failure is not None:
                        raise journey.failure
                    raise _nobody_in(journey.group, wait)
                case _:
                    self.admission.move(ticket, Verdict.NO_OPINION)

    async def _wait_for_slot(self, journey: _Journey) -> None:
        ticket, record = journey.ticket, journey.job.record
        if ticket.outcome is not None:
            return
        began = trio.current_time()
        record.phase = Phase.QUEUED
        within = min(self._balancing.queue_timeout, max(0.0, journey.job.deadline - began))
        try:
            await self.admission.wait(ticket, within)
        except trio.TooSlowError:
            if journey.failure is not None:
                raise journey.failure from None
            wait = self.admission.waitroom.retry_after(ticket.queue)
            raise queue_timeout(ticket.queue, within, wait) from None
        finally:
            record.queue_wait += trio.current_time() - began

    async def _attempt(
        self, upstream: Upstream, journey: _Journey, sink: Sink
    ) -> WholeAnswer | None:
        job, endpoint = journey.job, upstream.endpoint
        record = job.record
        record.attempts += 1
        journey.asked_usage = upstream.asks_usage
        model = self.balancer.models[endpoint.model].config
        call = Call(
            request=job.request,
            body=job.request.body_for(
                model.upstream_model or endpoint.model, ask_usage=upstream.asks_usage
            ),
            request_id=record.request_id,
            tracing=job.tracing,
            fresh=journey.needs_fresh,
        )
        timing = self._timing(job, model.timeouts)
        began, result = trio.current_time(), "cancelled"
        measurement = None
        if endpoint.adaptive is not None:
            measurement = Measurement(
                endpoint, began, endpoint.in_flight, job.request.prompt_tokens, self.admission.pump
            )
            record.on_commit = measurement.first_token if job.request.stream else None
        try:
            if job.request.stream:
                await self._relay(upstream, call, timing, record, sink)
                answer = None
            else:
                answer = await self.client.ask(upstream.target, call, timing, record)
                record.prompt_tokens = answer.usage.prompt_tokens
                record.completion_tokens = answer.usage.completion_tokens
                if measurement is not None:
                    measurement.whole(record.completion_tokens, trio.current_time())
            result = "ok"
        except UpstreamFailure as failure:
            result = _result(failure.error)
            if measurement is not None:
                measurement.failed(failure, trio.current_time())
            raise
        finally:
            record.on_commit = None
            self.metrics.attempted(endpoint, result)
        now = trio.current_time()
        endpoint.latency.observe((record.committed or now) - began, now)
        return answer

    async def _relay(
        self, upstream: Upstream, call: Call, timing: Timing, record: RequestRecord, sink: Sink
    ) -> None:
        reader = StreamReader(expected=call.request.choices)
        try:
            await self.client.relay(upstream.target, call, timing, record, sink, reader)
        finally:
            usage = reader.final_usage()
            record.prompt_tokens = usage.prompt_tokens
            record.completion_tokens = usage.completion_tokens
            if reader.malformed:
                self.metrics.malformed(upstream.endpoint.model, reader.malformed)

    def _learn(self, upstream: Upstream, failure: UpstreamFailure) -> None:
        now = trio.current_time()
        if failure.cool_down is not None:
            upstream.endpoint.cool_down(failure.cool_down, now)
        if failure.error.code in {"upstream_connection_error", "timeout_connect"}:
            self.suspect(upstream.endpoint)

    def _may_go_on(self, journey: _Journey, upstream: Upstream, failure: UpstreamFailure) -> bool:
        """Whether to ask somebody else after *failure*; if so, the journey is set on its way."""
        job, now = journey.job, trio.current_time()
        if failure.committed or now >= job.deadline:
            return False
        journey.failure = failure
        if failure.stale:
            return self._may_go_on_after_stale(journey, upstream, now)
        if job.record.attempts >= self._balancing.max_attempts:
            return False
        if _refuses_usage(journey, failure):
            upstream.asks_usage = False  # once more, with what it understands
            journey.aim_again(upstream.endpoint)
            return True
        if failure.error.code == "context_length_exceeded":
            journey.keep_only(self.balancer.larger_contexts(upstream.endpoint.model, journey.later))
            return bool(journey.later) and self._can_afford(failure, now) and journey.next_group()
        match failure.judgement.retry:
            case Retry.NEVER:
                return False
            case Retry.AMBIGUOUS if not self._may_repeat(journey):
                return False
        journey.tried.add(upstream.endpoint)
        journey.aim()
        return journey.has_somewhere_to_go(now) and self._can_afford(failure, now)

    def _may_go_on_after_stale(self, journey: _Journey, upstream: Upstream, now: float) -> bool:
        """A connection that had been idle is dead: no fault of the request, nor of the endpoint.

        It may have been executed all the same, so it is repeated once: elsewhere if that can be
        afforded, else over a new connection to the same endpoint.
        """
        if not self._may_repeat(journey):
            return False
        tried = {*journey.tried, upstream.endpoint}
        if journey.group.is_any_left(tried, now) and self.budget.withdraw(now):
            journey.tried = tried
            journey.aim()
        else:
            journey.aim_again(upstream.endpoint)
        journey.needs_fresh = True
        return True

    def _can_afford(self, failure: UpstreamFailure, now: float) -> bool:
        """Whether there is budget for a retry; if not, the client had better not retry either."""
        if self.budget.withdraw(now):
            return True
        failure.error.should_retry = False
        return False

    def _may_repeat(self, journey: _Journey) -> bool:
        """Whether a request that may have been executed may be sent once more."""
        allowed = self._balancing.retry_ambiguous is RetryAmbiguous.STATELESS
        if not allowed or journey.repeated or not journey.job.request.stateless:
            return False
        journey.repeated = True
        return True

    def _timing(self, job: Job, own: TimeoutsConfig) -> Timing:
        shared = self.balancer.config.performance.timeouts
        return Timing(
            connect=own.connect or shared.connect or _CONNECT,
            headers=own.headers or shared.headers or math.inf,
            first_token=own.first_token or shared.first_token or math.inf,
            idle=own.idle or shared.idle or _IDLE,
            total=own.total or shared.total or math.inf,
            deadline=job.deadline,
            allowed=job.allowed,
            shortened=job.shortened,
        )


@attrs.define(eq=False)
class _Journey:
    """How far a job has come: whom it has tried, and who is left."""

    job: Job
    groups: list[Group]
    tried: set[Endpoint] = attrs.field(factory=set, init=False)
    repeated: bool = attrs.field(default=False, init=False)
    needs_fresh: bool = attrs.field(default=False, init=False)  # a connection, not an old one
    asked_usage: bool = attrs.field(default=False, init=False)  # by our own `stream_options`
    failure: UpstreamFailure | None = attrs.field(default=None, init=False)
    group: Group = attrs.field(init=False)
    ticket: Ticket = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.group = self.groups.pop(0)
        name = self.group.name
        nobody: frozenset[Endpoint] = frozenset()
        self.ticket = Ticket(name, (self.group, nobody), partial(self.group.choose, nobody))

    @property
    def later(self) -> tuple[Group, ...]:
        return tuple(self.groups)

    def keep_only(self, groups: tuple[Group, ...]) -> None:
        self.groups = list(groups)

    def next_group(self) -> bool:
        """Turn to the next fallback; false if there is none."""
        if not self.groups:
            return False
        self.group = self.groups.pop(0)
        self.job.record.route_reason = f"fallback:{self.group.name}"
        self.aim()
        return True

    def aim(self) -> None:
        """Let the ticket ask for endpoints of the current group that were not tried."""
        tried = frozenset(self.tried)
        self.ticket.queue = self.group.name
        self.ticket.group = (self.group, tried)
        self.ticket.choose = partial(self.group.choose, tried)

    def aim_again(self, endpoint: Endpoint) -> None:
        """The same; an endpoint that has been cordoned meanwhile may finish what it has begun."""
        self.aim()
        if endpoint.cordoned:
            self.ticket.group = (self.group, endpoint)
            self.ticket.choose = partial(_finish_there, endpoint)

    def has_somewhere_to_go(self, now: float) -> bool:
        return bool(self.groups) or self.group.is_any_left(self.tried, now)


def _finish_there(endpoint: Endpoint, now: float) -> Choice:
    if not endpoint.breaker.would_admit(now):
        return Nobody(endpoint.available_in(now))
    return endpoint if endpoint.has_room() else None


def _nobody_in(group: Group, retry_after: float) -> GatewayError:
    if group.is_cordoned():
        return all_cordoned(group.name, retry_after)
    return no_healthy_backend(group.name, retry_after)


def _result(error: GatewayError) -> str:
    """A failed attempt's label, from a closed set: an engine's own code may be anything."""
    return error.code if is_our_finding(error.code) else f"upstream_{error.status}"


def _refuses_usage(journey: _Journey, failure: UpstreamFailure) -> bool:
    """Whether an engine refused ``stream_options``, which was our addition."""
    request = journey.job.request
    return (
        journey.asked_usage
        and request.stream
        and b"stream_options" not in request.body  # else the engine may be quoting the client
        and not request.wants_usage
        and failure.error.status in {400, 422}
        and "stream_options" in failure.error.message
    )
