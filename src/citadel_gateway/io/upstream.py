"""One request to one endpoint: send it, judge what comes back, relay it or say what failed.

Everything that waits here waits under one cancel scope whose deadline moves from phase to phase,
so there is no timer per read.  The scope never encloses a ``yield``.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import attrs
import trio

from citadel_gateway.errors import GatewayError, timed_out, upstream_failed
from citadel_gateway.io.connection import Connection
from citadel_gateway.io.dial import Origin, is_our_own_lack
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.record import Phase
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.retry import Judgement, Retry, judge_status
from citadel_gateway.wire.headers import Headers, first
from citadel_gateway.wire.http1_response import BadResponse, CutShort
from citadel_gateway.wire.openai_answer import (
    EngineError,
    EventKind,
    NotAnAnswer,
    StreamReader,
    Usage,
    check_whole_answer,
    parse_error,
)
from citadel_gateway.wire.openai_request import InferenceRequest, Kind
from citadel_gateway.wire.retry_after import parse_retry_after
from citadel_gateway.wire.sse import DONE, EventSplitter, EventTooLarge

T = TypeVar("T")

MAX_ANSWER = 64 * 2**20
_MAX_HELD_EVENTS = 64
_MAX_HELD_BYTES = 256 * 1024
_MAX_ERROR_BODY = 256 * 1024
_AFTER_DONE = 0.05  # for the end of a body whose last event was already here


@attrs.frozen(kw_only=True)
class Timing:
    """The clocks of one attempt, in seconds; ``deadline`` is a point in Trio's time.

    :param deadline: a whole answer, or the first token of a stream, must be here by then.
    :param shortened: the client asked for that deadline, so missing it is nobody's failure.
    """

    connect: float
    headers: float
    first_token: float
    idle: float
    total: float
    deadline: float
    allowed: float
    shortened: bool = False


@attrs.frozen(kw_only=True)
class Target:
    """How to speak to one endpoint; request heads are made once."""

    origin: Origin
    heads: dict[Kind, bytes]

    @classmethod
    def of(cls, url: str, api_key: str | None) -> Target:
        """*url* is an endpoint's base address; ``/v1`` is appended unless it is there."""
        origin, path = split_url(url)
        base = path if path.endswith("/v1") else path + "/v1"
        credentials = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        heads = {
            kind: (
                f"POST {base}{kind.value} HTTP/1.1\r\n"
                f"host: {origin.authority.decode()}\r\n"
                "content-type: application/json\r\n"
                "accept: application/json, text/event-stream\r\n"
                # Bytes are relayed as they come, so they had better not be compressed.
                "accept-encoding: identity\r\n"
                f"user-agent: citadel-gateway\r\n{credentials}"
            ).encode("ascii")
            for kind in Kind
        }
        return cls(origin=origin, heads=heads)


def split_url(url: str) -> tuple[Origin, str]:
    """The origin of a checked URL, and its path without a slash at the end."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    host, colon, port = authority.rpartition(":")
    if not colon or "]" in port:
        host, port = authority, ""
    usual = 443 if scheme == "https" else 80
    origin = Origin(scheme, host.strip("[]"), int(port) if port else usual)
    return origin, (slash + path).rstrip("/")


@attrs.frozen(kw_only=True)
class Call:
    """What is sent: the request, its body for this endpoint, and the headers that go along."""

    request: InferenceRequest
    body: bytes
    request_id: str
    tracing: Headers

    def encode(self, target: Target) -> bytes:
        extra = b"".join([b"%s: %s\r\n" % pair for pair in self.tracing])
        return b"%sx-request-id: %s\r\n%scontent-length: %d\r\n\r\n%s" % (
            target.heads[self.request.kind],
            self.request_id.encode("ascii"),
            extra,
            len(self.body),
            self.body,
        )


@attrs.frozen(kw_only=True)
class WholeAnswer:
    body: bytes
    usage: Usage


class Sink(Protocol):
    """Where a stream goes: the client, or whoever stands in for it."""

    async def start(self, data: bytes) -> None:
        """Commit the answer: send the head and the first events."""
        ...

    async def write(self, data: bytes) -> None: ...

    async def finish(self, data: bytes) -> None:
        """Send the last bytes and end the body."""
        ...


class Progress(Protocol):
    """Where the request is, kept up to date for whoever asks later."""

    phase: Phase
    upstream_wait: float


@attrs.define(eq=False)
class UpstreamFailure(Exception):
    """An endpoint did not answer as it should.

    :param error: what to tell the client if nobody else answers.
    :param judgement: whether to ask elsewhere, and what it says about the endpoint.
    :param cool_down: seconds the endpoint asked to be left alone.
    :param committed: bytes of this answer have reached the client.
    :param resent: the request was sent twice already, over a connection that had died.
    """

    error: GatewayError
    judgement: Judgement
    cool_down: float | None = None
    committed: bool = False
    resent: bool = False

    def __str__(self) -> str:
        return self.error.message


_BAD_SAFE = Judgement(Retry.SAFE, Verdict.BAD)
_BAD_AMBIGUOUS = Judgement(Retry.AMBIGUOUS, Verdict.BAD)


@attrs.define(eq=False)
class UpstreamClient:
    """Sends requests to endpoints over the shared pool."""

    pool: ConnectionPool

    async def ask(
        self, target: Target, call: Call, timing: Timing, progress: Progress
    ) -> WholeAnswer:
        """A whole answer, complete and valid.  Raises :class:`UpstreamFailure`."""
        attempt = _Attempt(self.pool, target, call, timing, progress)
        return await attempt.run(attempt.read_whole)

    async def relay(
        self,
        target: Target,
        call: Call,
        timing: Timing,
        progress: Progress,
        sink: Sink,
        reader: StreamReader,
    ) -> None:
        """Relay a stream to *sink* until it is complete; *reader* reads along.

        Raises :class:`UpstreamFailure`; once that is ``committed``, the stream was cut.
        """
        attempt = _Attempt(self.pool, target, call, timing, progress)
        await attempt.run(_Relay(attempt, sink, reader).run)


@attrs.define(eq=False)
class _Attempt:
    """The life of one attempt: a connection, a clock, and the translation of failures."""

    pool: ConnectionPool
    target: Target
    call: Call
    timing: Timing
    progress: Progress
    committed: bool = False
    _connection: Connection | None = attrs.field(default=None, init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _clock: str = attrs.field(default="connect", init=False)
    _allowed: float = attrs.field(default=0.0, init=False)
    _sent: bool = attrs.field(default=False, init=False)
    _sent_at: float = attrs.field(default=0.0, init=False)
    _resent: bool = attrs.field(default=False, init=False)

    async def run(self, use: Callable[[Connection], Awaitable[T]]) -> T:
        """Send the request and *use* the connection once the head of a good answer is there.

        Whatever goes wrong is raised as :class:`UpstreamFailure`.
        """
        try:
            with self._scope:
                connection = await self._send()
                if connection.response.status != 200:
                    raise await self._refused(connection)
                return await use(connection)
            raise self._timed_out()
        except UpstreamFailure as failure:
            failure.committed, failure.resent = self.committed, self._resent
            raise
        except (EngineError, NotAnAnswer, EventTooLarge, BadResponse, OSError) as exc:
            raise self._failure(exc) from exc
        finally:
            await self._let_go()

    async def read_whole(self, connection: Connection) -> WholeAnswer:
        self._set_clock("total", math.inf)
        if first(connection.response.headers, b"content-encoding") not in {None, b"identity"}:
            raise NotAnAnswer("the upstream's answer is compressed")
        body = await _read_all(connection, MAX_ANSWER)
        return WholeAnswer(body=body, usage=check_whole_answer(self.call.request.kind, body))

    def expect_first_token(self) -> None:
        self._set_clock("first_token", self._sent_at + self.timing.first_token)

    def expect_more(self) -> None:
        """The next read of a stream is due; called again after each."""
        now = trio.current_time()
        idle, total = now + self.timing.idle, self._sent_at + self.timing.total
        self._clock, self._allowed = (
            ("idle", self.timing.idle) if idle <= total else ("total", self.timing.total)
        )
        self._scope.deadline = min(idle, total)

    def stop_clock(self) -> None:
        """Somebody else's turn to be slow: the client's."""
        self._scope.deadline = math.inf

    async def _send(self) -> Connection:
        connection = await self._connect(fresh=False)
        try:
            await self._exchange(connection)
        except (CutShort, OSError):
            died = connection.is_reused and not connection.response.started
            if not died or not self.call.request.stateless:
                raise
            # The upstream hung up on an idle connection just as we used it.
            self._resent = True
            await self._let_go()
            connection = await self._connect(fresh=True)
            await self._exchange(connection)
        return connection

    async def _connect(self, *, fresh: bool) -> Connection:
        self._sent = False
        self.progress.phase = Phase.CONNECTING
        began = trio.current_time()
        self._set_clock("connect", began + self.timing.connect)
        connection = await self.pool.acquire(self.target.origin, fresh=fresh)
        self._connection = connection
        self.progress.upstream_wait += trio.current_time() - began
        return connection

    async def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self.note_wait(connection)
            await self.pool.release(connection)

    def note_wait(self, connection: Connection) -> None:
        """Add to the books how long the upstream has kept us waiting."""
        self.progress.upstream_wait += connection.waited
        connection.waited = 0.0

    async def _exchange(self, connection: Connection) -> None:
        self._sent, self._sent_at = True, trio.current_time()
        self.progress.phase = Phase.WAITING
        self._set_clock("headers", self._sent_at + self.timing.headers)
        try:
            await connection.send(self.call.encode(self.target))
        except OSError as exc:
            # It may have refused the request while we were still sending: that answer counts.
            try:
                await connection.read_head()
            except (BadResponse, OSError):
                raise exc from None
        else:
            await connection.read_head()

    def _set_clock(self, name: str, deadline: float) -> None:
        timing = self.timing
        if deadline < timing.deadline:
            self._clock = name
            self._allowed = {
                "connect": timing.connect,
                "headers": timing.headers,
                "first_token": timing.first_token,
            }[name]
        else:
            self._clock = "first_token" if self.call.request.stream else "total"
            self._allowed = timing.allowed
        self._scope.deadline = min(deadline, timing.deadline)

    def _timed_out(self) -> UpstreamFailure:
        error = timed_out(self._clock, self._allowed)
        late = self._scope.deadline >= self.timing.deadline
        verdict = Verdict.NO_OPINION if late and self.timing.shortened else Verdict.BAD
        retry = Retry.AMBIGUOUS if self._sent else Retry.SAFE
        return UpstreamFailure(error, Judgement(Retry.NEVER if late else retry, verdict))

    async def _refused(self, connection: Connection) -> UpstreamFailure:
        """The failure behind a status other than 200, whose body is read to its end."""
        response = connection.response
        status = response.status
        body = await _read_all(connection, _MAX_ERROR_BODY)
        if status < 400:
            code = "upstream_redirect" if 300 <= status < 400 else "upstream_protocol_error"
            error = upstream_failed(f"the upstream answered with status {status}", code)
            return UpstreamFailure(error, _BAD_AMBIGUOUS)
        wait = first(response.headers, b"retry-after")
        cool_down = parse_retry_after(wait)
        judgement = judge_status(status, has_retry_after=wait is not None)
        error = _client_error(status, parse_error(status, body), cool_down)
        return UpstreamFailure(error, judgement, cool_down if status in {429, 503} else None)

    def _failure(self, exc: Exception) -> UpstreamFailure:
        """What an exception means; the one place where they are told apart."""
        match exc:
            case EngineError():
                judgement = judge_status(exc.status, has_retry_after=False)
                failure = UpstreamFailure(_client_error(exc.status, exc, None), judgement)
            case ssl.SSLError():
                error = upstream_failed(f"TLS failed: {exc}", "upstream_connection_error")
                failure = UpstreamFailure(error, _BAD_SAFE)
            case OSError() if is_our_own_lack(exc):
                error = upstream_failed(
                    "The gateway is out of sockets.", "gateway_exhausted", status=503
                )
                error.retry_after = 1.0
                failure = UpstreamFailure(error, Judgement(Retry.NEVER, Verdict.NO_OPINION))
            case OSError() if not self._sent:
                error = upstream_failed(f"cannot connect: {exc}", "upstream_connection_error")
                failure = UpstreamFailure(error, _BAD_SAFE)
            case OSError() | CutShort():
                error = upstream_failed(str(exc), "upstream_connection_error")
                failure = UpstreamFailure(error, _BAD_AMBIGUOUS)
            case _:
                error = upstream_failed(str(exc), "upstream_protocol_error")
                failure = UpstreamFailure(error, _BAD_AMBIGUOUS)
        failure.committed, failure.resent = self.committed, self._resent
        return failure


@attrs.define(eq=False)
class _Relay:
    """A stream on its way from a connection to a sink."""

    attempt: _Attempt
    sink: Sink
    reader: StreamReader
    _splitter: EventSplitter = attrs.field(factory=EventSplitter, init=False)
    _started: bool = attrs.field(default=False, init=False)
    _held: list[bytes] = attrs.field(factory=list, init=False)
    _held_bytes: int = attrs.field(default=0, init=False)

    async def run(self, connection: Connection) -> None:
        _check_is_stream(connection.response.headers)
        attempt, reader = self.attempt, self.reader
        attempt.expect_first_token()
        while data := await connection.read_body():
            error = self._take_in(self._splitter.feed(data))
            if attempt.committed and not reader.done:
                attempt.stop_clock()
                attempt.note_wait(connection)
                await self._flush()
                attempt.expect_more()
            if error is not None:
                raise error
            if reader.done:
                break
        else:
            self._take_in_rest()
        if not reader.is_whole:
            if attempt.committed:
                await self._flush()
            raise CutShort("the upstream ended the stream before its answer did", started=True)
        attempt.stop_clock()
        await self._finish()
        await _read_to_end(connection)

    def _take_in(self, events: list[bytes]) -> Exception | None:
        """Hold events back for the next write; returns the error that one of them is, if any."""
        attempt, reader = self.attempt, self.reader
        for event in events:
            try:
                kind = reader.read(event)
            except (EngineError, NotAnAnswer) as exc:
                return exc
            if kind is EventKind.DONE:
                return None  # written by us, when it is known to be true
            if kind is EventKind.CONTENT:
                attempt.committed = True
            elif kind is EventKind.MALFORMED or (
                kind is EventKind.USAGE and not attempt.call.request.wants_usage
            ):
                continue
            self._held.append(event)
            self._held_bytes += len(event)
        too_much = len(self._held) > _MAX_HELD_EVENTS or self._held_bytes > _MAX_HELD_BYTES
        if too_much and not attempt.committed:
            return NotAnAnswer("the upstream sent many events and no content")
        return None

    def _take_in_rest(self) -> None:
        """The upstream hung up: a last event may lack its blank line."""
        rest = self._splitter.rest().strip()
        if rest:
            error = self._take_in([rest + b"\n\n"])
            if error is not None:
                raise error

    async def _flush(self) -> None:
        data = b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        if not self._started:
            self._started = True
            self.attempt.progress.phase = Phase.STREAMING
            await self.sink.start(data)
        elif data:
            await self.sink.write(data)

    async def _finish(self) -> None:
        self._held.append(DONE)
        if not self._started:
            await self._flush()
        await self.sink.finish(b"".join(self._held))


async def _read_to_end(connection: Connection) -> None:
    """Wait a moment for the end of a body, so that its connection can be used again."""
    with trio.move_on_after(_AFTER_DONE):
        await connection.read_body()


async def _read_all(connection: Connection, limit: int) -> bytes:
    pieces, size = [], 0
    while piece := await connection.read_body():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise BadResponse(f"the upstream's answer is larger than {limit} bytes")
    return b"".join(pieces)


def _check_is_stream(headers: Headers) -> None:
    content_type = first(headers, b"content-type") or b""
    if not content_type.lower().startswith(b"text/event-stream"):
        kind = content_type.decode("latin-1") or "no content type"
        raise NotAnAnswer(f"the upstream answered a stream request with {kind}")


def _client_error(status: int, error: EngineError, retry_after: float | None) -> GatewayError:
    """What the client is told when an engine refused and nobody else answers."""
    if status in {401, 403}:
        return upstream_failed(
            "The upstream does not accept the gateway's credentials.",
            "upstream_credentials_exhausted",
        )
    overloaded = status in {429, 503}
    return GatewayError(
        error.message,
        status,
        error.kind,
        error.code or ("upstream_overloaded" if overloaded else f"upstream_{status}"),
        error.param,
        retry_after=(retry_after or 1.0) if overloaded else None,
        should_retry=False if status >= 500 and not overloaded else None,
    )
