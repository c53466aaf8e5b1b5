"""The centre of the gateway: a request finds a place, is sent, and if need be goes elsewhere."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial

import attrs
import trio

from citadel_gateway.app import clocks, failover
from citadel_gateway.app.failover import Pause, StillResting
from citadel_gateway.app.hedging import Race, Runner
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
from citadel_gateway.policy.hedging import HedgeResult, Hedging
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.retry import Judgement, Retry, RetryBudget
from citadel_gateway.policy.waitroom import Choice, Displaced, Nobody, Refused, Ticket, TooLong
from citadel_gateway.wire.continuation import Continuation, may_be_continued
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.openai_request import AUTO, InferenceRequest
from citadel_gateway.wire.openai_stream import StreamReader


@attrs.frozen(kw_only=True)
class Job:
    """A request on its way through the gateway.

    :param deadline: in Trio's time; a whole answer or a first token is due by then.
    :param allowed: the same in seconds from its arrival, for messages.
    :param shortened: the client asked for that deadline by header.
    :param longest: seconds from its arrival that the client said it would wait.
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
    longest: float = math.inf


@attrs.define(eq=False)
class GatewayOrchestrator:
    """Takes jobs to endpoints.

    Everything a job holds is on its ticket, and the ticket is given back in one ``finally``.

    :param suspect: told of endpoints that could not be reached, so that they are probed at once.
    :param on_rest: told when one has asked to be left alone for a while.
    :param draw: returns a number from 0 to 1, for pauses.
    """

    balancer: LoadBalancer
    admission: Admission
    client: UpstreamClient
    metrics: Metrics
    suspect: Callable[[Endpoint], None]
    on_rest: Callable[[], None]
    draw: Callable[[], float] = random.random
    budget: RetryBudget = attrs.field(init=False)
    _allows_for_prompts: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        balancing = self._balancing
        self.budget = RetryBudget(balancing.retry_budget_ratio, balancing.retry_budget_floor)
        self._allows_for_prompts = clocks.allows_for_prompts(self.balancer.config)

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
        if self._allows_for_prompts and job.request.stream:
            job = self._with_time_for_prompt(job)
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
            if journey.pause is not None:
                await self._take(journey.pause, journey)
            upstream = await self._find_place(journey)
            try:
                if upstream.hedging is None:
                    answer = await self._attempt(upstream, journey, sink)
                else:
                    answer = await self._attempt_or_two(upstream, upstream.hedging, journey, sink)
            except UpstreamFailure as failure:
                upstream = journey.current
                journey.verdict = failure.judgement.verdict
                self._learn(upstream, failure)
                if not self._may_go_on(journey, upstream, failure):
                    raise journey.cause(failure) from None
                self._step_on(journey)
                journey.verdict = Verdict.NO_OPINION
                if failure.committed:
                    travel = partial(self._travel, journey)
                    return await kept_alive(sink, self._streaming.keep_alive, travel, begun=True)
            else:
                journey.verdict = Verdict.GOOD
                return answer

    def _step_on(self, journey: _Journey) -> None:
        """Give up the slot: for another one, or for a pause."""
        job = journey.job
        if journey.pause is None:
            journey.pause = failover.pause(job.record.attempts, job.deadline, self.draw)
        if journey.pause is None:
            self.admission.move(journey.ticket, journey.verdict)
        else:
            self.admission.step_out(journey.ticket, journey.verdict)

    async def _take(self, pause: Pause, journey: _Journey) -> None:
        record, began = journey.job.record, trio.current_time()
        record.phase, journey.pause = Phase.BACKING_OFF, None
        try:
            await pause.take(journey.job.deadline)
        except StillResting as still:
            if journey.failure is None:
                raise
            journey.failure.error.retry_after = still.rest
            raise journey.failure from None
        finally:
            record.upstream_wait += trio.current_time() - began
        self.admission.come_back(journey.ticket)

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
                    return journey.upstream(endpoint)
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
            self.metrics.timed_out("queue", journey.group.name)
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
        journey.asked_usage = upstream.asks_usage
        model = self.balancer.models[endpoint.model].config
        continuation = journey.continuation(upstream)
        record.attempts += 1
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
            if failure.clock is not None:
                self.metrics.timed_out(failure.clock, endpoint.model)
            if measurement is not None:
                measurement.failed(failure, trio.current_time())
            raise
        finally:
            record.on_commit = None
            if record.outrun and result == "cancelled":
                result = "lost"
            self.metrics.attempted(endpoint, result)
        if continuation is None:
            now = trio.current_time()
            endpoint.latency.observe((record.committed or now) - began, now)
        return answer

    async def _attempt_or_two(
        self, upstream: Upstream, hedging: Hedging, journey: _Journey, sink: Sink
    ) -> WholeAnswer | None:
        """The same, and where a stream's first content is late, another attempt beside it."""
        if not journey.job.request.stream or journey.rescue is not None:
            return await self._attempt(upstream, journey, sink)
        record, model = journey.job.record, upstream.endpoint.model
        race = Race(
            sink=sink,
            record=record,
            ticket=journey.ticket,
            admission=self.admission,
            hedging=hedging,
            first=self._runner(upstream, journey, journey.ticket),
            find_second=partial(self._find_second, upstream, journey, trio.current_time()),
            on_failure=partial(self._go_on_with_the_other, journey),
        )
        after = hedging.after(trio.current_time()) if self._may_hedge(journey) else None
        try:
            await race.run(after, self.client.deadlines)
        finally:
            leader = race.leader
            journey.asked_usage = leader.journey.asked_usage
            journey.delivered = leader.journey.delivered
            if race.result is not None:
                self._note_hedge(record, model, race.result)
        return None

    def _runner(
        self, upstream: Upstream, journey: _Journey, ticket: Ticket, waited: float = 0.0
    ) -> Runner[_Journey]:
        record = journey.job.record.for_attempt(waited)
        own = copy.copy(journey)
        own.job = attrs.evolve(journey.job, record=record)
        journey.job.record.attempts += 1
        return Runner(
            upstream=upstream,
            ticket=ticket,
            record=record,
            journey=own,
            attempt=partial(self._attempt, upstream, own),
        )

    def _may_hedge(self, journey: _Journey) -> bool:
        return (
            not journey.hedged
            and len(journey.group.upstreams) > 1
            and journey.job.record.attempts < self._balancing.max_attempts
            and not journey.repeated
            and journey.job.request.stateless
        )

    def _find_second(
        self, first: Upstream, journey: _Journey, began: float
    ) -> Runner[_Journey] | None:
        """Another endpoint that has room now: a hedge waits for nothing, and nobody for it."""
        now, model, group = trio.current_time(), first.endpoint.model, journey.group
        record = journey.job.record
        if now >= journey.job.deadline:
            return None
        journey.hedged = True
        choose = partial(group.spare, model, {*journey.tried, first.endpoint})
        ticket = Ticket(group.name, group, choose)
        slot = self.admission.spare(ticket)
        if slot is None:
            self._note_hedge(record, model, HedgeResult.NO_ROOM)
            return None
        if not self.budget.withdraw(now):
            self.admission.leave(ticket, Verdict.NO_OPINION)
            self._note_hedge(record, model, HedgeResult.NO_BUDGET)
            return None
        journey.repeated = True
        return self._runner(group.upstreams[slot.endpoint], journey, ticket, waited=now - began)

    def _go_on_with_the_other(
        self, journey: _Journey, runner: Runner[_Journey], failure: UpstreamFailure
    ) -> None:
        """One of two attempts has failed, and there need be no third for that."""
        journey.note_work(failure)
        self._learn(runner.upstream, failure)
        journey.tried.add(runner.upstream.endpoint)
        if _refuses_usage(runner.journey, failure):
            runner.upstream.asks_usage = False
        if failure.judgement.retry is Retry.SAFE:
            journey.repeated = False  # it was not executed, so it may still be executed twice

    def _note_hedge(self, record: RequestRecord, model: str, result: HedgeResult) -> None:
        record.hedge = result.value
        self.metrics.hedged(model, result)

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
            self.on_rest()
        if failure.error.code in {"upstream_connection_error", "timeout_connect"}:
            self.suspect(upstream.endpoint)

    def _may_go_on(self, journey: _Journey, upstream: Upstream, failure: UpstreamFailure) -> bool:
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
        if _refuses_usage(journey, failure):
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
        if not journey.has_somewhere_to_go(now) and not self._may_wait(journey, failure):
            return False
        journey.aim()
        return self._can_afford(failure, now)

    def _may_wait(self, journey: _Journey, failure: UpstreamFailure) -> bool:
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
            journey.aim_again(upstream)
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
        return clocks.timing(
            own,
            self.balancer.config.performance.timeouts,
            prompt_tokens=job.request.prompt_tokens if self._allows_for_prompts else 0,
            deadline=job.deadline,
            allowed=job.allowed,
            shortened=job.shortened,
        )

    def _with_time_for_prompt(self, job: Job) -> Job:
        extra = clocks.time_for_prompt(
            [model.config.timeouts for group in job.plan.groups for model in group.models],
            self.balancer.config.performance.timeouts,
            job.request.prompt_tokens,
        )
        allowed = min(job.allowed + extra, max(job.allowed, job.longest))
        return attrs.evolve(
            job,
            deadline=job.deadline + allowed - job.allowed,
            allowed=allowed,
            shortened=job.longest <= allowed,
        )


@attrs.define(eq=False)
class _Journey:
    """How far a job has come: whom it has tried, and who is left."""

    job: Job
    groups: list[Group]
    tried: set[Endpoint] = attrs.field(factory=set, init=False)
    repeated: bool = attrs.field(default=False, init=False)
    needs_fresh: bool = attrs.field(default=False, init=False)  # a connection, not an old one
    has_been_worked_on: bool = attrs.field(default=False, init=False)
    asked_usage: bool = attrs.field(default=False, init=False)  # by our own `stream_options`
    pause: Pause | None = attrs.field(default=None, init=False)  # before the next attempt
    failure: UpstreamFailure | None = attrs.field(default=None, init=False)
    verdict: Verdict = attrs.field(default=Verdict.NO_OPINION, init=False)  # of whom it is with
    delivered: Delivered | None = attrs.field(default=None, init=False)  # by a stream that broke
    rescue: Rescue | None = attrs.field(default=None, init=False)
    hedged: bool = attrs.field(default=False, init=False)  # it was time to ask a second, once
    # May be asked once more, and leave its group first.
    again: Upstream | None = attrs.field(default=None, init=False)
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
            raise UpstreamFailure(error, Judgement(Retry.SAFE, Verdict.NO_OPINION))
        return found

    def note_work(self, failure: UpstreamFailure) -> None:
        """Once an engine may have answered, the client had better not begin from the start.

        However the last attempt fails: a prompt that ends engines would end one more.
        """
        if failure.judgement.retry is Retry.AMBIGUOUS and not failure.stale:
            self.has_been_worked_on = True
        if self.has_been_worked_on:
            failure.error.should_retry = False

    @property
    def current(self) -> Upstream:
        """Whom it is with; of two that were asked at once, who was first, or has failed last."""
        match self.ticket.outcome:
            case Slot(endpoint=endpoint):
                return self.upstream(endpoint)
            case _:
                raise RuntimeError("it is with nobody")

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

    def upstream(self, endpoint: Endpoint) -> Upstream:
        """How to speak to *endpoint*, which is in its group, or was when it was asked before."""
        if self.again is not None and self.again.endpoint is endpoint:
            return self.group.upstreams.get(endpoint, self.again)
        return self.group.upstreams[endpoint]

    def aim_again(self, upstream: Upstream) -> None:
        """The same; an endpoint that has been cordoned meanwhile may finish what it has begun."""
        self.aim()
        self.again, endpoint = upstream, upstream.endpoint
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
