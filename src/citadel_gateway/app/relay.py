"""The inference routes: from the head of a request to the last byte of its answer.

They are plain ASGI, in front of Quart: building its request and response objects would cost more
than everything that is done here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from citadel_gateway.app.client_response import AsgiClient, Client, ClientResponse
from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
from citadel_gateway.app.guard import Doorkeeper
from citadel_gateway.app.journey import Job
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.overload import Overload
from citadel_gateway.errors import GatewayError, body_too_large, draining, internal_error
from citadel_gateway.io.buffers import STEP, UNCOUNTED, NoRoom
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.http1_exchange import EXCHANGE, Exchange, ResponseAborted
from citadel_gateway.io.record import Outcome, RequestRecord
from citadel_gateway.policy.priority import NAMES
from citadel_gateway.wire.headers import Fields, Headers, request_id
from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.openai_request import AUTO, Kind, parse_request
from citadel_gateway.wire.session import parse_with_key

ROUTES = {"/v1" + kind.value: kind for kind in Kind}
_LAST_WORDS = 1.0  # seconds, for telling a client that its stream is cut because we stop

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@attrs.define(eq=False)
class Relay:
    """Serves inference requests by one configuration, from their beginning to their end.

    :param on_end: told of every request once, when it has ended.
    :param on_crash: told of exceptions that should not have been.
    :param is_cutting: whether requests are being cancelled because the gateway stops.
    """

    doorkeeper: Doorkeeper
    balancer: LoadBalancer
    orchestrator: GatewayOrchestrator
    overload: Overload
    on_end: Callable[[RequestRecord], None]
    on_crash: Callable[[str, Exception], None]
    is_cutting: Callable[[], bool]
    active: int = attrs.field(default=0, init=False)  # requests that it serves right now
    _on_idle: Callable[[], None] | None = attrs.field(default=None, init=False)

    def retire(self, on_idle: Callable[[], None]) -> None:
        """Nothing new will come; *on_idle* is told when the last request has ended."""
        self._on_idle = on_idle
        if not self.active:
            on_idle()

    async def __call__(
        self,
        scope: dict[str, Any],
        fields: Fields,
        receive: Receive,
        send: Send,
        extra: Headers,
    ) -> None:
        """*extra* are headers for every answer, such as those of CORS."""
        exchange: Exchange | None = (scope.get("extensions") or {}).get(EXCHANGE)
        if exchange is not None:
            response = self._make_response(scope, fields, exchange, extra)
            exchange.on_leave = response.record.pass_on_leave
            await self._serve(_Request(scope, fields, receive, exchange), response)
            return
        # A server that only tells us when the client leaves: watch for it beside the work.
        inbox, aborted = _Inbox(receive), None
        async with trio.open_nursery() as nursery:
            client = AsgiClient(self._bounded(send, nursery.cancel_scope))
            response = self._make_response(scope, fields, client, extra)
            nursery.start_soon(inbox.watch, response, nursery.cancel_scope)
            try:
                await self._serve(_Request(scope, fields, inbox.receive, None), response)
            except ResponseAborted as exc:
                aborted = exc
            nursery.cancel_scope.cancel()
        if aborted is not None:
            raise aborted  # out here, as the nursery would have wrapped it in a group

    def _bounded(self, send: Send, everything: trio.CancelScope) -> Send:
        """*send*, for a server whose own flow control may never let us finish."""
        within = self.balancer.config.service.write_timeout

        async def bounded(message: dict[str, Any]) -> None:
            with trio.move_on_after(within) as scope:
                await send(message)
            if scope.cancelled_caught:
                everything.cancel()
                await trio.lowlevel.checkpoint()

        return bounded

    def _make_response(
        self, scope: dict[str, Any], fields: Fields, client: Client, extra: Headers
    ) -> ClientResponse:
        record = RequestRecord(
            request_id=request_id(fields),
            route=scope["path"],
            client=(scope.get("client") or ("unknown",))[0],
            began=trio.current_time(),
        )
        show = self.balancer.config.gateway.routing_headers
        return ClientResponse(client, record, show, extra)

    async def _serve(self, request: _Request, response: ClientResponse) -> None:
        record = response.record
        self.active += 1
        try:
            await self._answer(request, response)
        except trio.Cancelled:
            await self._say_goodbye(response, request.refusal)
            raise
        except ResponseAborted:
            raise
        except Exception as exc:
            record.outcome = Outcome.INTERNAL_ERROR
            self.on_crash("relay", exc)
            if response.started:
                raise ResponseAborted from exc
            await response.error(internal_error(executed=record.attempts > 0))
        finally:
            record.ended = trio.current_time()
            if record.held:
                self.overload.buffers.let_go(record)
            self.on_end(record)
            self.active -= 1
            if self._on_idle is not None and not self.active:
                self._on_idle()

    async def _answer(self, request: _Request, response: ClientResponse) -> None:
        try:
            job = await self._accept(request, response)
            answer = await self.orchestrator.answer(job, response)
            if answer is not None:
                await response.whole(answer.body)
        except GatewayError as error:
            if response.started:  # for the sake of a comment, so that nobody hung up on us
                await response.break_off(error, Outcome.STREAM_BROKEN)
            await response.error(error)
        except UpstreamFailure as failure:
            if response.started:
                await response.break_off(failure.error, Outcome.STREAM_BROKEN)
            await response.error(failure.error, by_upstream=True)
        except NoRoom:
            await response.error(self.overload.no_room())

    async def _accept(self, asked: _Request, response: ClientResponse) -> Job:
        """Check the head, read the body, find out where it may go.  Raises ``GatewayError``."""
        record, fields, doorkeeper = response.record, asked.fields, self.doorkeeper
        head = doorkeeper.known(fields)
        visitor = doorkeeper.identify(asked.scope, fields) if head is None else head.visitor
        key = visitor.key
        record.client = visitor.client
        if key is not None:
            record.key_id = key.id
        told = doorkeeper.admit(visitor, record.began)
        if told is None:
            told = await doorkeeper.admit_far(visitor)
        response.headers = response.headers + told
        if self.overload.is_refusing:
            raise self.overload.refusal()
        if head is None:
            head = doorkeeper.examine(visitor, fields)
        record.priority = NAMES[head.party.rank]
        deadline = record.began + head.allowed
        self.orchestrator.refuse_if_hopeless(head.party, key, record, deadline)
        body = await self._read_body(asked, head.most, record)
        record.bytes_in = len(body)
        if not asked.was_complete:
            record.received = trio.current_time()
        header = self.balancer.session_header
        if header is None:
            request, session = parse_request(ROUTES[record.route], body), None
        else:
            request, session = parse_with_key(ROUTES[record.route], body, fields.get(header))
        record.stream = request.stream
        plan = self.balancer.plan(request, key)
        record.model = "" if plan.groups[0].name == AUTO else plan.groups[0].name
        record.route_reason = plan.reason
        return Job(
            request=request,
            plan=plan,
            record=record,
            tracing=head.tracing,
            deadline=deadline,
            allowed=head.allowed,
            shortened=head.shortened,
            longest=head.longest,
            party=head.party,
            key=session,
        )

    async def _read_body(self, asked: _Request, most: int, record: RequestRecord) -> bytes:
        if asked.was_complete and asked.exchange is not None:
            body = asked.exchange.take_body()
        else:
            body = await self._collect_body(asked, most, record)
        if len(body) > most:
            raise body_too_large(most)
        return body

    async def _collect_body(self, asked: _Request, most: int, record: RequestRecord) -> bytes:
        """The whole body, or as much of it as tells that it is larger than *most* bytes.

        Raises :class:`NoRoom`: before the first byte is read, if the head tells the length.
        """
        buffers, room = self.overload.buffers, UNCOUNTED
        announced = asked.fields.get(b"content-length", b"")
        if announced.isdigit() and (length := int(announced)) > room:
            buffers.hold(record, length)
            room = length
        message = await asked.receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            pieces, size = [body], len(body)
            while message.get("more_body") and size <= most:
                if size > room:
                    buffers.hold(record, size - room + STEP)
                    room = size + STEP
                message = await asked.receive()
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
            body = b"".join(pieces)
        return body

    async def _say_goodbye(self, response: ClientResponse, refusal: BadRequest | None) -> None:
        """We were cancelled, and note why.

        The request was none, and the server says so; or the client has left; or the gateway stops
        and is out of patience.
        """
        record = response.record
        if record.outcome is not None:
            return
        if refusal is not None:
            record.refuse(status=refusal.status, code="bad_http_request", message=str(refusal))
            return
        if not self.is_cutting():
            record.client_left()
            return
        record.outcome = Outcome.DRAINING
        with trio.move_on_after(_LAST_WORDS, shield=True):
            if not response.started:
                await response.error(draining())
            elif record.stream and not response.ending:
                try:
                    await response.break_off(draining(), Outcome.DRAINING)
                except ResponseAborted:
                    return  # what is left to do, the cancellation does


@attrs.define(eq=False)
class _Request:
    """A request as it comes in; *exchange* is there if the server is ours."""

    scope: dict[str, Any]
    fields: Fields
    receive: Receive
    exchange: Exchange | None
    was_complete: bool = attrs.field(init=False)  # before anybody waited for its body

    def __attrs_post_init__(self) -> None:
        self.was_complete = self.exchange is not None and self.exchange.request.complete

    @property
    def refusal(self) -> BadRequest | None:
        """What the server found wrong with the rest, if that is why it cancelled."""
        return self.exchange.refusal if self.exchange is not None else None


@attrs.define(eq=False)
class _Inbox:
    """Separates a request's body from the news that its client has left."""

    source: Receive
    _send: trio.MemorySendChannel[dict[str, Any]] = attrs.field(init=False)
    _messages: trio.MemoryReceiveChannel[dict[str, Any]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._send, self._messages = trio.open_memory_channel[dict[str, Any]](0)

    async def watch(self, response: ClientResponse, scope: trio.CancelScope) -> None:
        while (message := await self.source())["type"] == "http.request":
            await self._send.send(message)
        if not response.ending:  # afterwards, the server reports the end of every request
            scope.cancel()

    async def receive(self) -> dict[str, Any]:
        return await self._messages.receive()
