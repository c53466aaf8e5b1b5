"""Bugs to plant in the gateway, each a small one that has been seen in some gateway or other.

A simulation that never fails proves nothing: these show what it would find.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock
from weakref import WeakSet

import attrs
import trio

from citadel_gateway.app import gateway_orchestrator, rescue
from citadel_gateway.app.client_response import ClientResponse
from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
from citadel_gateway.app.guard import Doorkeeper
from citadel_gateway.app.hedging import Race, Runner
from citadel_gateway.app.journey import Journey
from citadel_gateway.app.relay import Relay
from citadel_gateway.app.retrying import Retrying
from citadel_gateway.app.upstream_maker import UpstreamMaker
from citadel_gateway.io import attempt
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.connection import Connection
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.departures import Departures
from citadel_gateway.io.http1_exchange import ResponseAborted
from citadel_gateway.io.metrics import Metrics
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.record import Outcome
from citadel_gateway.io.stream_relay import StreamRelay
from citadel_gateway.policy.circuit_breaker import CircuitBreaker, State, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.rate_limit import TokenBucket
from citadel_gateway.policy.retry import Retry, RetryBudget
from citadel_gateway.policy.waitroom import Waitroom
from citadel_gateway.wire import continuation
from citadel_gateway.wire.continuation import Continuation, Prefill
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.openai_answer import Usage
from citadel_gateway.wire.openai_stream import EventKind, StreamReader
from citadel_gateway.wire.seam import Diverged, Seam
from citadel_gateway.wire.sse import DONE, EventSplitter, encode_event

Original = Callable[..., Any]


@attrs.frozen
class Bug:
    """:param mutate: what stands in for *owner*'s *name*; it gets the original first."""

    what: str
    owner: Any
    name: str
    mutate: Callable[..., Any]

    @contextmanager
    def planted(self) -> Iterator[None]:
        original = inspect.getattr_static(self.owner, self.name)
        if isinstance(original, property):
            mutant: Any = property(partial(self.mutate, original.fget))
        else:
            mutant = self._mutant(original)
        with mock.patch.object(self.owner, self.name, mutant):
            yield

    def _mutant(self, original: Original) -> Original:
        @wraps(original)
        def mutant(*args: Any, **kwargs: Any) -> Any:
            return self.mutate(original, *args, **kwargs)

        return mutant


PLANTED: dict[str, Bug] = {}


def bug(what: str, owner: Any, name: str) -> Callable[[Original], Original]:
    """The decorated function stands in for *owner*'s *name*; its own name is the bug's."""

    def plant(mutate: Original) -> Original:
        PLANTED[mutate.__name__] = Bug(what, owner, name, mutate)
        return mutate

    return plant


# Things that are not given back.


@bug("a cancelled request keeps its seat and its slot", Waitroom, "leave")
def slot_kept_on_cancel(
    leave: Original, self: Waitroom, ticket: Any, verdict: Any, now: Any
) -> Any:
    if verdict is Verdict.NO_OPINION and isinstance(ticket.outcome, Slot):
        return None
    return leave(self, ticket, verdict, now)


@bug("a request that stops waiting stays in the queue", Waitroom, "_dequeue")
def ticket_leaked_on_timeout(dequeue: Original, self: Waitroom, ticket: Any) -> None:
    if ticket.outcome is not None:
        dequeue(self, ticket)


@bug("the connection of a cancelled request is not closed", ConnectionPool, "release")
async def connection_leaked(release: Original, self: ConnectionPool, connection: Any) -> None:
    if connection.is_reusable():
        await release(self, connection)


@bug("a closed connection still counts as open", ConnectionPool, "_discard")
async def connection_counted_for_ever(
    discard: Original, self: ConnectionPool, connection: Any
) -> None:
    await discard(self, connection)
    if not connection.is_reusable():
        self._open.add(connection)


# Breakers, probes and cool-downs.


@bug("a probe without a verdict never gives its permit back", CircuitBreaker, "settle")
def probe_permit_lost(
    settle: Original, self: CircuitBreaker, permit: Any, verdict: Any, now: float
) -> Any:
    if permit.probe and verdict is Verdict.NO_OPINION:
        return None
    return settle(self, permit, verdict, now)


@bug("a good probe does not close the breaker", CircuitBreaker, "_good")
def breaker_never_closes(good: Original, self: CircuitBreaker, permit: Any, now: float) -> Any:
    return None if permit.probe else good(self, permit, now)


@bug("a half-open breaker lets everybody through", CircuitBreaker, "would_admit")
def half_open_floodgate(_: Original, self: CircuitBreaker, now: float) -> bool:
    return self.state(now) is not State.OPEN


@bug("an open breaker lets requests through", CircuitBreaker, "would_admit")
def breaker_ignored(_: Original, self: CircuitBreaker, now: float) -> bool:
    return not self._probe_out


@bug("an endpoint that passes its probes again is not told to anybody", Endpoint, "eased")
def recovery_untold(_: Original, self: Endpoint) -> None:
    """Nothing."""


@bug("the Retry-After of an engine is not minded", Endpoint, "cool_down")
def cool_down_ignored(_: Original, self: Endpoint, seconds: float, now: float) -> None:
    """Nothing."""


# Caps and limits.


@bug("an endpoint gets one request too many", UpstreamMaker, "make")
def cap_off_by_one(make: Original, self: UpstreamMaker, *args: Any) -> Any:
    upstream = make(self, *args)
    endpoint = upstream.endpoint
    endpoint.resize(endpoint.max_concurrent + 1, None, endpoint.slow_start)
    return upstream


@bug("the whole gateway has one seat too many", Waitroom, "__init__")
def seats_off_by_one(init: Original, self: Waitroom, *, seats: int, **others: Any) -> None:
    init(self, seats=seats + 1, **others)


@bug("a rate limit has one too many in its bucket", TokenBucket, "__init__")
def burst_off_by_one(init: Original, self: TokenBucket, rate: float, burst: float) -> None:
    init(self, rate, burst + 1)


# Streams.


@bug("a broken stream ends like a whole one", ClientResponse, "break_off")
async def cut_passed_off_as_whole(
    _: Original, self: ClientResponse, error: Any, outcome: Any
) -> None:
    self.record.outcome, self.record.error_code = outcome, error.code
    await self.client.write(DONE, last=True)
    raise ResponseAborted


@bug("a broken stream ends without a word", ClientResponse, "break_off")
async def cut_without_a_word(_: Original, self: ClientResponse, error: Any, outcome: Any) -> None:
    self.record.outcome, self.record.error_code = outcome, error.code
    await trio.lowlevel.checkpoint()
    raise ResponseAborted


@bug("a stream counts as whole without its finish_reason", StreamReader, "is_whole")
def end_not_looked_for(_: Original, self: StreamReader) -> bool:
    return True


@bug("an event is lost where three come together", EventSplitter, "feed")
def event_lost(feed: Original, self: EventSplitter, data: bytes) -> list[bytes]:
    events: list[bytes] = feed(self, data)
    return events if len(events) < 3 else [events[0], *events[2:]]


@bug("malformed events are passed on", StreamReader, "read")
def malformed_passed_on(read: Original, self: StreamReader, event: bytes) -> EventKind:
    kind: EventKind = read(self, event)
    return EventKind.QUIET if kind is EventKind.MALFORMED else kind


@bug("the usage chunk is sent to who has not asked for it", StreamRelay, "_passes")
def usage_forced_upon(_: Original, self: StreamRelay, kind: EventKind) -> bool:
    return kind is not EventKind.MALFORMED


# Streams that go on.


_JOINED: WeakSet[Seam] = WeakSet()


@bug("an engine that goes on is told one word too few", rescue, "resume")
def joined_one_word_early(resume: Original, request: Any, delivered: Delivered, how: Any) -> Any:
    told = delivered.copy()
    told.text = told.text[: max(told.text.rstrip().rfind(b" "), 0)]
    return resume(request, told, how)


@bug("the first token of an engine that goes on is lost", Seam, "_new_text")
def joined_one_token_late(new_text: Original, self: Seam, said: str) -> Any:
    text = new_text(self, said)
    if text.strip() and self not in _JOINED:
        _JOINED.add(self)
        return ""
    return text


@bug("a replay is passed on from its beginning", Seam, "_new_text")
def replay_said_twice(new_text: Original, self: Seam, said: str) -> Any:
    text = new_text(self, said)
    return said if self.is_replay else text


@bug("a replay that says something else is passed on", Seam, "_new_text")
def replay_not_compared(new_text: Original, self: Seam, said: str) -> Any:
    try:
        return new_text(self, said)
    except Diverged:
        self._text_at = len(self.text)
        return said


@bug("white space where two streams join is there twice", Continuation, "make_seam")
def white_space_twice(make_seam: Original, self: Continuation) -> Any:
    return make_seam(attrs.evolve(self, repeats=""))


@bug("what was delivered is counted twice", Seam, "usage")
def usage_counted_twice(usage: Original, self: Seam, second: Usage) -> Any:
    joined = usage(self, second)
    return Usage(joined.prompt_tokens, joined.completion_tokens + self._tokens_before)


@bug("only the last engine's tokens are counted", Seam, "usage")
def usage_of_the_last_only(_: Original, self: Seam, second: Usage) -> Usage:
    return second


@bug("an engine that goes on may say as much as the first", continuation, "_ask_for_the_rest")
def limit_begun_anew(_: Original, *args: Any) -> bool:
    return False


@bug("another model goes on with a stream", Journey, "keep_only")
def continued_by_another_model(keep_only: Original, self: Journey, groups: Any) -> None:
    if groups:
        keep_only(self, groups)


@bug("an engine is asked to go on of which nobody knows whether it can", rescue.Rescue, "_style")
def prefill_taken_for_granted(_: Original, self: Any, upstream: Any) -> Any:
    return Prefill.LAST_MESSAGE


@bug("streams are continued though that is turned off", GatewayOrchestrator, "_memory")
def continued_though_off(_: Original, self: GatewayOrchestrator, journey: Any) -> Delivered:
    before = journey.delivered
    return Delivered(self._streaming.continue_max_bytes) if before is None else before.copy()


@bug("a stream that goes on does so under another name", Seam, "_take_identity")
def identity_of_the_second(_: Original, self: Seam, chunk: Any) -> None:
    """Nothing."""


@bug("an error comes behind the [DONE]", ClientResponse, "break_off")
async def error_behind_done(break_off: Original, self: Any, error: Any, outcome: Any) -> None:
    await self.write(DONE)
    await break_off(self, error, outcome)


@bug("a broken stream says so twice", ClientResponse, "break_off")
async def broken_said_twice(break_off: Original, self: Any, error: Any, outcome: Any) -> None:
    await self.write(encode_event(error.body()))
    await break_off(self, error, outcome)


@bug("comments are sent to those who have not asked for them", gateway_orchestrator, "kept_alive")
async def comments_forced_upon(
    kept_alive: Original, sink: Any, every: Any, work: Any, **others: Any
) -> Any:
    return await kept_alive(sink, every or 0.05, work, **others)


@bug("a comment counts as the beginning of the answer", Retrying, "may_go_on")
def comment_counts_as_content(
    may_go_on: Original, self: GatewayOrchestrator, journey: Any, upstream: Any, failure: Any
) -> Any:
    failure.committed = failure.committed or journey.job.record.committed is not None
    return may_go_on(self, journey, upstream, failure)


# The queue.


@bug("who leaves does not tell those who wait", Admission, "leave")
def left_in_silence(_: Original, self: Admission, ticket: Any, verdict: Any) -> None:
    slot = ticket.outcome
    transition = self.waitroom.leave(ticket, verdict, trio.current_time())
    if transition is not None:
        self.on_transition(slot.endpoint, transition)


@bug("of several who are called at once only one wakes up", Admission, "pump")
def wake_up_lost(_: Original, self: Admission) -> None:
    if self.waitroom.is_anybody_waiting():
        called = [t for t in self.waitroom.pump(trio.current_time()) if t in self._calls]
        for ticket in called[:1]:
            self._calls[ticket].set()


@bug("the end of a cool-down is not told to those who wait", Endpoint, "rest_ends_at")
def end_of_cool_down_untold(_: Original, self: Endpoint, now: float) -> float:
    opens = self.breaker.opens_again_at()
    return math.inf if opens is None else opens


@bug("nobody is called when an endpoint that came back gets more", Endpoint, "may_take_more_at")
def next_step_untold(_: Original, self: Endpoint, now: float) -> float:
    return self.rest_ends_at(now)


# Retries.


@bug("there is always budget for a retry", RetryBudget, "withdraw")
def retries_ignore_their_budget(_: Original, self: RetryBudget, now: float) -> bool:
    return True


@bug("what may have been executed is repeated as often as it fails",
     Retrying, "_may_repeat")  # fmt: skip
def ambiguous_repeated(_: Original, self: GatewayOrchestrator, journey: Any) -> bool:
    return True


@bug("a stream that has begun is begun again elsewhere", Retrying, "may_go_on")
def retried_after_commit(
    may_go_on: Original, self: GatewayOrchestrator, journey: Any, upstream: Any, failure: Any
) -> Any:
    failure.committed = False
    return may_go_on(self, journey, upstream, failure)


@bug("an endpoint that has failed is asked again", Journey, "aim")
def tried_forgotten(aim: Original, self: Journey) -> None:
    self.tried.clear()
    aim(self)


@bug("every error of an engine is worth a retry", attempt, "from_status")
def caller_mistakes_retried(from_status: Original, *args: Any) -> Any:
    failure = from_status(*args)
    failure.judgement = attrs.evolve(failure.judgement, retry=Retry.SAFE)
    return failure


# Hedges.


@bug("of two attempts at a stream, the one that has lost goes on", Runner, "call_off")
def loser_not_called_off(_: Original, self: Runner[Any]) -> None:
    """Nothing."""


@bug("the second attempt keeps its slot when it has lost or failed", Race, "_end")
def hedge_slot_leaked(end: Original, self: Race[Any], runner: Any) -> None:
    if runner is self.leader:
        end(self, runner)
    else:
        runner.is_over = True


@bug("both attempts at a stream reach its client", Race, "commit")
def nobody_wins(_: Original, self: Race[Any], runner: Any) -> bool:
    self._let_lead(runner)
    return True


@bug("a hedge is not paid for by the retry budget", GatewayOrchestrator, "_find_second")
def hedges_are_free(find: Original, self: GatewayOrchestrator, *args: Any) -> Any:
    with mock.patch.object(RetryBudget, "withdraw", return_value=True):
        return find(self, *args)


@bug("what may have been executed is hedged again and again", GatewayOrchestrator, "_may_hedge")
def hedged_without_end(_: Original, self: GatewayOrchestrator, journey: Any) -> bool:
    return True


# Connections.


@bug("a connection is used again, whatever was left in it", Connection, "is_reusable")
def connection_reused_in_doubt(_: Original, self: Connection) -> bool:
    return True


@bug("nobody looks whether an idle connection has ended", Connection, "is_stale")
def staleness_ignored(_: Original, self: Connection) -> bool:
    return False


# Leaving, and time.


@bug("nobody notices that clients leave", Departures, "_tell")
def departure_unnoticed(_: Original, self: Departures) -> None:
    self._epoll.poll(0, 1024)


@bug("a deadline that comes sooner than the others is not minded", Deadlines, "move")
def deadline_lost(move: Original, self: Deadlines, deadline: Any, due: float) -> None:
    deadline.due = due
    if self._next == math.inf:
        move(self, deadline, due)


@bug("a client's own deadline is not minded", Doorkeeper, "timeout")
def client_deadline_ignored(_: Original, self: Doorkeeper, fields: Any) -> tuple[float, bool]:
    return self._allowed, False


# Books.


@bug("a request that was tried twice is counted twice", Metrics, "finished")
def counted_twice(finished: Original, self: Metrics, record: Any) -> None:
    finished(self, record)
    if record.attempts > 1:
        finished(self, record)


@bug("a client that leaves the queue has no line in the log", Relay, "_serve")
async def outcome_lost(serve: Original, self: Relay, request: Any, response: Any) -> None:
    tell = self.on_end

    def tell_some(record: Any) -> None:
        if record.outcome is not Outcome.CLIENT_CLOSED or record.attempts:
            tell(record)

    await serve(attrs.evolve(self, on_end=tell_some), request, response)


@bug("a cut stream is logged as good", ClientResponse, "break_off")
async def cut_logged_as_good(break_off: Original, self: Any, error: Any, outcome: Any) -> None:
    try:
        await break_off(self, error, outcome)
    finally:
        self.record.outcome = Outcome.OK
