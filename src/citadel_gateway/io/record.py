"""What is written down about a request while it lives, for metrics and the access log."""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs

CLIENT_CLOSED_REQUEST = 499
"""In logs and metrics only: nobody is there to be told."""


class Phase(enum.Enum):
    """Where a request is; a client that leaves is counted by the phase it left in."""

    RECEIVING = "receiving"
    QUEUED = "queued"
    CONNECTING = "connecting"
    WAITING = "waiting"
    BACKING_OFF = "backing_off"  # between two attempts
    STREAMING = "streaming"
    ANSWERING = "answering"


class Outcome(enum.Enum):
    """How a request ended; every request has exactly one."""

    OK = "ok"
    INVALID_REQUEST = "invalid_request"
    UNAUTHORIZED = "unauthorized"
    UNKNOWN_MODEL = "unknown_model"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    OVERLOADED = "overloaded"
    NO_BACKEND = "no_healthy_backend"
    DRAINING = "draining"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    UPSTREAM_REJECTED = "upstream_rejected"
    UPSTREAM_ERROR = "upstream_error"
    TIMEOUT = "timeout"
    STREAM_BROKEN = "stream_broken"
    CLIENT_CLOSED = "client_closed"
    INTERNAL_ERROR = "internal_error"


_CLOCKS = frozenset(f"timeout_{c}" for c in ("connect", "headers", "first_token", "idle", "total"))
_OF_UPSTREAMS = _CLOCKS | {
    "upstream_connection_error",
    "upstream_protocol_error",
    "upstream_redirect",
    "upstream_credentials_exhausted",
    "gateway_exhausted",
}

_BY_CODE = {
    "invalid_api_key": Outcome.UNAUTHORIZED,
    "model_not_allowed": Outcome.UNAUTHORIZED,
    "model_not_found": Outcome.UNKNOWN_MODEL,
    "rate_limit_exceeded": Outcome.RATE_LIMITED,
    "queue_full": Outcome.QUEUE_FULL,
    "queue_timeout": Outcome.QUEUE_TIMEOUT,
    "overloaded": Outcome.OVERLOADED,
    "no_healthy_backend": Outcome.NO_BACKEND,
    "draining": Outcome.DRAINING,
    "too_many_connections": Outcome.TOO_MANY_CONNECTIONS,
    "internal_error": Outcome.INTERNAL_ERROR,
}


def is_our_finding(code: str) -> bool:
    """Whether an upstream's failure has a *code* of ours; engines make up any others."""
    return code in _OF_UPSTREAMS


def nobody_to_hang_up_on() -> None:
    """What ``hang_up`` of a request does that has no connection to an upstream."""


@attrs.define(eq=False)
class RequestRecord:
    """One request's facts.  Times are Trio's, in seconds; names of models come from the config."""

    request_id: str
    route: str
    client: str
    began: float
    phase: Phase = Phase.RECEIVING
    outcome: Outcome | None = None
    status: int = 0
    error_code: str | None = None
    error: str | None = None
    key_id: str | None = None
    model: str = ""
    endpoint: str = ""
    route_reason: str = ""
    priority: str = "default"
    attempts: int = 0
    stream: bool = False
    received: float | None = None  # when the whole request was here
    committed: float | None = None  # when the head of the answer was sent
    overhead: float | None = None  # seconds that the gateway itself had added by then
    ended: float = 0.0
    queue_wait: float = 0.0
    hang_up: Callable[[], None] = nobody_to_hang_up_on
    on_commit: Callable[[float], None] | None = None  # told the time, if somebody wants to know
    upstream_wait: float = 0.0
    held: int = 0  # bytes of the common budget for what is buffered
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    hedge: str | None = None  # what came of asking a second endpoint, if it was time to
    outrun: bool = False  # of one of two attempts: the other was first

    def for_attempt(self, waited: float) -> RequestRecord:
        """One for an attempt that may not be the only one; *waited* by others before it."""
        return attrs.evolve(
            self,
            upstream_wait=self.upstream_wait + waited,
            hang_up=nobody_to_hang_up_on,
            on_commit=None,
        )

    def adopt(self, attempt: RequestRecord) -> None:
        """What such an attempt has noted is true of the request."""
        self.phase, self.upstream_wait = attempt.phase, attempt.upstream_wait
        self.prompt_tokens = attempt.prompt_tokens
        self.completion_tokens = attempt.completion_tokens

    def pass_on_leave(self) -> None:
        """Tell the upstream at once that nobody listens any more."""
        self.hang_up()

    def commit(self, status: int, now: float) -> None:
        """The answer begins.

        What the gateway has added until now is what is left of the time without the waits for
        the client's body, for a slot, and for upstreams.
        """
        self.status, self.committed = status, now
        if self.on_commit is not None:
            self.on_commit(now)
        began = self.began if self.received is None else self.received
        self.overhead = max(0.0, now - began - self.queue_wait - self.upstream_wait)

    def client_left(self) -> None:
        """Note that nobody waits for the answer any more; a status that was sent stays."""
        self.outcome = Outcome.CLIENT_CLOSED
        self.error_code = "client_closed_request"
        self.status = self.status or CLIENT_CLOSED_REQUEST

    def refuse(self, *, status: int, code: str, message: str, by_upstream: bool = False) -> None:
        """Note the error that the client was told."""
        self.status, self.error_code, self.error = status, code, message
        if by_upstream:
            self.outcome = Outcome.UPSTREAM_ERROR if status >= 500 else Outcome.UPSTREAM_REJECTED
            if code in _CLOCKS:
                self.outcome = Outcome.TIMEOUT
        else:
            self.outcome = _BY_CODE.get(code, Outcome.INVALID_REQUEST)
