"""A request on its way: what it wants, whom it has tried, and who is left."""

from __future__ import annotations

import math
from functools import partial

import attrs

from citadel_gateway.app.failover import Pause
from citadel_gateway.app.group import Group, Plan
from citadel_gateway.app.rescue import Rescue
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.record import RequestRecord
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.retry import Judgement, Retry
from citadel_gateway.policy.waitroom import Choice, Nobody, Ticket
from citadel_gateway.wire.continuation import Continuation
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.openai_request import InferenceRequest


@attrs.frozen(kw_only=True)
class Job:
    """A request on its way through the gateway.

    :param deadline: in Trio's time; a whole answer or a first token is due by then.
    :param allowed: the same in seconds from its arrival, for messages.
    :param shortened: the client asked for that deadline by header.
    :param longest: seconds from its arrival that the client said it would wait.
    :param party: whose turn it takes when there is a queue.
    :param key: of what it belongs to, such as a session; ``None`` if that does not matter.
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
    key: int | None = None


@attrs.define(eq=False)
class Journey:
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
            group.choose_any if job.key is None else partial(group.choose, (), key=job.key),
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
        self.ticket.choose = partial(self.group.choose, tried, key=self.job.key)

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

    def refuses_usage(self, failure: UpstreamFailure) -> bool:
        """Whether an engine refused ``stream_options``, which was our addition."""
        request = self.job.request
        return (
            self.asked_usage
            and request.stream
            and b"stream_options" not in request.body  # else the engine may be quoting the client
            and not request.wants_usage
            and failure.error.status in {400, 422}
            and "stream_options" in failure.error.message
        )


def _finish_there(endpoint: Endpoint, now: float) -> Choice:
    if not endpoint.breaker.would_admit(now):
        return Nobody(endpoint.available_in(now))
    return endpoint if endpoint.has_room() else None
