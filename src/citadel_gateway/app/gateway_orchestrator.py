"""The centre of the gateway: a request finds a place, is sent, and if need be goes elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import attrs
import trio

from citadel_gateway.app.load_balancer import Group, LoadBalancer, Plan, Upstream
from citadel_gateway.app.measuring import Measurement
from citadel_gateway.app.rescue import Rescue, is_worth_continuing
from citadel_gateway.config.schema import LoadBalancerConfig, StreamingConfig, TimeoutsConfig
from citadel_gateway.config.values import RetryAmbiguous
from citadel_gateway.errors import (
    GatewayError,
    all_cordoned,
    no_healthy_backend,
    queue_full,
    queue_timeout,
    queue_too_long,
)
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.keep_alive import kept_alive
from citadel_gateway.io.metrics import Metrics
from citadel_gateway.io.record import Phase, RequestRecord, is_our_finding
from citadel_gateway.io.stream_relay import Sink
from citadel_gateway.io.target import Call, Timing
from citadel_gateway.io.upstream import UpstreamClient, WholeAnswer
from citadel_gateway.policy.auth import ApiKey
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.retry import Judgement, Retry, RetryBudget
from citadel_gateway.policy.waitroom import Choice, Displaced, Nobody, Refused, Ticket, TooLong
from citadel_gateway.wire.continuation import Continuation, may_be_continued
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.openai_request import AUTO, InferenceRequest
from citadel_gateway.wire.openai_stream import StreamReader

_CONNECT = 2.0
_IDLE = 20.0


@attrs.frozen(kw_only=True)
class Job:
    """A request on its way through the gateway.

    :param deadline: in Trio's time; a whole answer or a first token is due by then.
    :param allowed: the same in seconds from its arrival, for messages.
    :param shortened: the client asked for that deadline by header.
    :param party: whose turn it takes when there is a queue.
    """

    request: InferenceRequest
    plan: Plan
    record: RequestRecord
    tracing: Headers
    deadline: float
    allowed: float
    shortened: bool
    party: Party


@attrs.define(eq=False)
class GatewayOrchestrator:
    """Takes jobs to endpoints.

    Everything a job holds is on its ticket, and the ticket is given back in one ``finally``.

    :param suspect: told of endpoints that could not be reached, so that they are probed at once.
    :param cooled: told of endpoints that asked to be left alone.
    """

    balancer: LoadBalancer
    admission: Admission
    client: UpstreamClient
    metrics: Metrics
    suspect: Callable[[Endpoint], None]
    cooled: Callable[[Endpoint], None]
    budget: RetryBudget = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        balancing = self._balancing
        self.budget = RetryBudget(balancing.retry_budget_ratio, balancing.retry_budget_floor)

    @property
    def _streaming(self) -> StreamingConfig:
        return self.balancer.config.streaming

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
        except Refused as refused:
            raise self._turned_away(ticket.queue, refused) from None
        early = self._streaming.keep_alive_before_first_token
        try:
            if early is not None and job.request.stream:
                travel = partial(self._travel, journey)
                return await kept_alive(sink, early, travel, begun=False)
            return await self._travel(journey, sink)
        finally:
            ticket.settle(job.record.prompt_tokens, job.record.completion_tokens)
            self.admission.leave(ticket, journey.verdict)

    async def _travel(self, journey: _Journey, sink: Sink) -> WholeAnswer | None:
        while True:
            upstream = await self._find_place(journey)
            try:
                answer = await self._attempt(upstream, journey, sink)
            except UpstreamFailure as failure:
                journey.verdict = failure.judgement.verdict
                self._learn(upstream, failure)
                if not self._may_go_on(journey, upstream, failure):
                    raise journey.cause(failure) from None
                self.admission.move(journey.ticket, journey.verdict)
                journey.verdict = Verdict.NO_OPINION
                if failure.committed:
                    travel = partial(self._travel, journey)
                    return await kept_alive(sink, self._streaming.keep_alive, travel, begun=True)
            else:
                journey.verdict = Verdict.GOOD
                return answer

    def refuse_if_hopeless(
        self, party: Party, key: ApiKey | None, record: RequestRecord, deadline: float
    ) -> None:
        """Raise the ``GatewayError`` that a request is going to get whatever its body says.

        That is when every queue that it could join is full, and nobody there would have to make
        room for it, or when its turn would come too late in all of them.
        """
        waitroom, now = self.admission.waitroom, trio.current_time()
        if not waitroom.is_anybody_waiting():
            return
        groups = self.balancer.possible_groups(key)
        refused = waitroom.is_hopeless(groups, party, deadline, now)
        if refused is not None:
            record.model = groups[0].name if len(groups) == 1 else ""
            raise self._turned_away(record.model or AUTO, refused)

    def _turned_away(self, queue: str, refused: Refused) -> GatewayError:
        match refused:
            case TooLong(wait=wait):
                self.metrics.turned_away(queue, "too_long")
                return queue_too_long(queue, wait, refused.retry_after)
            case _:
                self.metrics.turned_away(queue, "full")
                return queue_full(queue, refused.retry_after)

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
                case Displaced(retry_after=wait):
                    self.metrics.turned_away(ticket.queue, "displaced")
                    raise queue_full(ticket.queue, wait)
                case _:
                    try:
                        self.admission.move(ticket, Verdict.NO_OPINION)
                    except Refused as refused:
                        raise self._turned_away(ticket.queue, refused) from None

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
            self.metrics.turned_away(ticket.queue, "timeout")
            wait = self.admission.waitroom.retry_after(ticket, trio.current_time())
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
        continuation = journey.continuation(upstream)
        request = job.request if continuation is None else continuation.request
        as_stream = request.stream or upstream.is_deaf(request.kind)
        call = Call(
            request=request,
            body=request.body_for(
                model.upstream_model or endpoint.model,
                ask_usage=upstream.asks_usage,
                as_stream=as_stream,
            ),
            request_id=record.request_id,
            tracing=job.tracing,
            fresh=journey.needs_fresh,
        )
        timing = self._timing(job, model.timeouts)
        if continuation is not None:
            self.metrics.continued(endpoint.model, continuation.way.value)
            timing = attrs.evolve(timing, total=record.began + timing.total - trio.current_time())
        began, result = trio.current_time(), "cancelled"
        measurement = None
        if endpoint.adaptive is not None:
            measurement = Measurement(
                endpoint, began, endpoint.in_flight, job.request.prompt_tokens, self.admission.pump
            )
            record.on_commit = measurement.first_token if job.request.stream else None
        try:
            if job.request.stream:
                await self._relay(upstream, call, timing, journey, sink)
                answer = None
            else:
                ask = self.client.ask_for_stream if as_stream else self.client.ask
                answer = await ask(upstream.target, call, timing, record)
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
        if continuation is None:
            now = trio.current_time()
            endpoint.latency.observe((record.committed or now) - began, now)
        return answer

    async def _relay(
        self, upstream: Upstream, call: Call, timing: Timing, journey: _Journey, sink: Sink
    ) -> None:
        record, continuation = journey.job.record, journey.continuation(upstream)
        reader = StreamReader(expected=call.request.choices, delivered=self._memory(journey))
        seam = None if continuation is None else continuation.make_seam()
        try:
            await self.client.relay(upstream.target, call, timing, record, sink, reader, seam)
        except UpstreamFailure as failure:
            if failure.committed:
                journey.delivered = reader.delivered
            raise
        finally:
            usage = reader.final_usage() if seam is None else seam.usage(reader.final_usage())
            record.prompt_tokens = usage.prompt_tokens
            record.completion_tokens = usage.completion_tokens
            if reader.malformed:
                self.metrics.malformed(upstream.endpoint.model, reader.malformed)

    def _memory(self, journey: _Journey) -> Delivered | None:
        """For the text of a stream, if there is anybody who could go on with it."""
        if journey.delivered is not None:
            return journey.delivered.copy()
        streaming, request = self._streaming, journey.job.request
        if (
            not streaming.continue_broken
            or len(journey.group.upstreams) < 2
            or not may_be_continued(request)
        ):
            return None
        return Delivered(streaming.continue_max_bytes)

    def _learn(self, upstream: Upstream, failure: UpstreamFailure) -> None:
        now = trio.current_time()
        if failure.cool_down is not None:
            upstream.endpoint.cool_down(failure.cool_down, now)
            self.cooled(upstream.endpoint)
        if failure.error.code in {"upstream_connection_error", "timeout_connect"}:
            self.suspect(upstream.endpoint)

    def _may_go_on(self, journey: _Journey, upstream: Upstream, failure: UpstreamFailure) -> bool:
        """Whether to ask somebody else after *failure*; if so, the journey is set on its way."""
        job, now = journey.job, trio.current_time()
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
        if _refuses_usage(journey, failure):
            upstream.asks_usage = False  # once more, with what it understands
            journey.aim_again(upstream.endpoint)
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
        journey.aim()
        return journey.has_somewhere_to_go(now) and self._can_afford(failure, now)

    def _may_continue(
        self, journey: _Journey, upstream: Upstream, failure: UpstreamFailure, now: float
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
        end = job.record.began + self._timing(job, model.timeouts).total
        journey.job = attrs.evolve(job, deadline=min(end, now + job.allowed))
        return journey.has_somewhere_to_go(now) and self._can_afford(failure, now)

    def _may_go_on_after_stale(self, journey: _Journey, upstream: Upstream, now: float) -> bool:
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
    verdict: Verdict = attrs.field(default=Verdict.NO_OPINION, init=False)  # of whom it is with
    delivered: Delivered | None = attrs.field(default=None, init=False)  # by a stream that broke
    rescue: Rescue | None = attrs.field(default=None, init=False)
    group: Group = attrs.field(init=False)
    ticket: Ticket = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.group = group = self.groups.pop(0)
        job, request = self.job, self.job.request
        self.ticket = Ticket(
            group.name,
            group,
            group.choose_any,
            job.party,
            request.prompt_tokens,
            math.inf if request.max_tokens is None else request.max_tokens * request.choices,
            job.deadline,
        )

    def cause(self, failure: UpstreamFailure) -> UpstreamFailure:
        """What to tell the client when *failure* is the last: why its stream broke, if it did."""
        return failure if self.rescue is None else self.rescue.failure

    def continuation(self, upstream: Upstream) -> Continuation | None:
        """What is sent to *upstream* instead of the request, if that broke in mid-stream."""
        if self.rescue is None:
            return None
        found = self.rescue.continuation(upstream)
        if found is None:  # it has only just come to be known
            error = self.rescue.failure.error
            raise UpstreamFailure(error, Judgement(Retry.NEVER, Verdict.NO_OPINION))
        return found

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
        self.ticket.group = (self.group, tried) if tried else self.group
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
