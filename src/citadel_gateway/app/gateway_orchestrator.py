"""The centre of the gateway: a request finds a place, is sent, and if need be goes elsewhere."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial

import attrs
import trio

from citadel_gateway.app import failover
from citadel_gateway.app.clocks import Clocks
from citadel_gateway.app.failover import Pause, StillResting
from citadel_gateway.app.group import Group
from citadel_gateway.app.hedging import Race, Runner
from citadel_gateway.app.journey import Job, Journey
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.measuring import Measurement
from citadel_gateway.app.retrying import Retrying
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.config.schema import LoadBalancerConfig, StreamingConfig
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
from citadel_gateway.policy.retry import Retry
from citadel_gateway.policy.waitroom import Displaced, Nobody, Refused, Ticket, TooLong
from citadel_gateway.wire.continuation import may_be_continued
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.openai_request import AUTO
from citadel_gateway.wire.openai_stream import StreamReader


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
    on_rest: Callable[[Endpoint], None]
    draw: Callable[[], float] = random.random
    retrying: Retrying = attrs.field(init=False)
    _clocks: Clocks = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._clocks = Clocks(self.balancer.config)
        self.retrying = Retrying(
            balancer=self.balancer, clocks=self._clocks, metrics=self.metrics, draw=self.draw
        )

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
        if self._clocks.allow_for_prompts and job.request.stream:
            job = self._clocks.with_time_for_prompt(job)
        self.retrying.budget.deposit(now)
        if not any(group.is_any_left((), now) for group in job.plan.groups):
            first = job.plan.groups[0]  # to queue for it would only delay the bad news
            raise _nobody_in(first, first.next_chance(now))
        journey = Journey(job, list(job.plan.groups))
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

    async def _travel(self, journey: Journey, sink: Sink) -> WholeAnswer | None:
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
                if not self.retrying.may_go_on(journey, upstream, failure):
                    raise journey.cause(failure) from None
                self._step_on(journey)
                journey.verdict = Verdict.NO_OPINION
                if failure.committed:
                    travel = partial(self._travel, journey)
                    return await kept_alive(sink, self._streaming.keep_alive, travel, begun=True)
            else:
                journey.verdict = Verdict.GOOD
                return answer

    def _step_on(self, journey: Journey) -> None:
        """Give up the slot: for another one, or for a pause."""
        job = journey.job
        if journey.pause is None:
            journey.pause = failover.pause(job.record.attempts, job.deadline, self.retrying.draw)
        if journey.pause is None:
            self.admission.move(journey.ticket, journey.verdict)
        else:
            self.admission.step_out(journey.ticket, journey.verdict)

    async def _take(self, pause: Pause, journey: Journey) -> None:
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

    async def _find_place(self, journey: Journey) -> Upstream:
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

    async def _wait_for_slot(self, journey: Journey) -> None:
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
        self, upstream: Upstream, journey: Journey, sink: Sink
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
        timing = self._clocks.timing(job, model.timeouts)
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
        self, upstream: Upstream, hedging: Hedging, journey: Journey, sink: Sink
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
        self, upstream: Upstream, journey: Journey, ticket: Ticket, waited: float = 0.0
    ) -> Runner[Journey]:
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

    def _may_hedge(self, journey: Journey) -> bool:
        return (
            not journey.hedged
            and len(journey.group.upstreams) > 1
            and journey.job.record.attempts < self._balancing.max_attempts
            and not journey.repeated
            and journey.job.request.stateless
        )

    def _find_second(
        self, first: Upstream, journey: Journey, began: float
    ) -> Runner[Journey] | None:
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
        if not self.retrying.budget.withdraw(now):
            self.admission.leave(ticket, Verdict.NO_OPINION)
            self._note_hedge(record, model, HedgeResult.NO_BUDGET)
            return None
        journey.repeated = True
        return self._runner(group.upstreams[slot.endpoint], journey, ticket, waited=now - began)

    def _go_on_with_the_other(
        self, journey: Journey, runner: Runner[Journey], failure: UpstreamFailure
    ) -> None:
        """One of two attempts has failed, and there need be no third for that."""
        journey.note_work(failure)
        self._learn(runner.upstream, failure)
        journey.tried.add(runner.upstream.endpoint)
        if runner.journey.refuses_usage(failure):
            runner.upstream.asks_usage = False
        if failure.judgement.retry is Retry.SAFE:
            journey.repeated = False  # it was not executed, so it may still be executed twice

    def _note_hedge(self, record: RequestRecord, model: str, result: HedgeResult) -> None:
        record.hedge = result.value
        self.metrics.hedged(model, result)

    async def _relay(
        self, upstream: Upstream, call: Call, timing: Timing, journey: Journey, sink: Sink
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

    def _memory(self, journey: Journey) -> Delivered | None:
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
            self.on_rest(upstream.endpoint)
        if failure.error.code in {"upstream_connection_error", "timeout_connect"}:
            self.suspect(upstream.endpoint)


def _nobody_in(group: Group, retry_after: float) -> GatewayError:
    if group.is_cordoned():
        return all_cordoned(group.name, retry_after)
    return no_healthy_backend(group.name, retry_after)


def _result(error: GatewayError) -> str:
    """A failed attempt's label, from a closed set: an engine's own code may be anything."""
    return error.code if is_our_finding(error.code) else f"upstream_{error.status}"
