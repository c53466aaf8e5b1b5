"""An upstream engine that says what a test tells it to, byte by byte, and remembers who left."""

from __future__ import annotations

import http.client
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import attrs
import trio

from tests.support.raw_client import (
    Chunked,
    Framing,
    Headers,
    Sized,
    parse_head,
    reset_stream,
    take_until,
)

Ended = Literal["running", "answered", "client_left", "closed", "reset", "hung", "stopped"]
Usage = tuple[int, int]
"""Prompt tokens and completion tokens."""
MODEL = "scripted"


@attrs.frozen
class Send:
    data: bytes


@attrs.frozen
class Sleep:
    seconds: float


@attrs.frozen
class Wait:
    event: trio.Event


@attrs.frozen
class Tell:
    event: trio.Event


@attrs.frozen
class Plain:
    """A step that needs no more than its name."""

    name: Literal["hang", "close", "reset", "stop_reading", "answered"]


Step = Send | Sleep | Wait | Tell | Plain


def send(data: bytes) -> Step:
    return Send(data)


def sleep(seconds: float) -> Step:
    return Sleep(seconds)


def wait(event: trio.Event) -> Step:
    """Go on when the test says so."""
    return Wait(event)


def tell(event: trio.Event) -> Step:
    """Let the test know that the script came this far."""
    return Tell(event)


def hang() -> Step:
    """Say nothing more until the client leaves."""
    return Plain("hang")


def close() -> Step:
    return Plain("close")


def reset() -> Step:
    return Plain("reset")


def stop_reading() -> Step:
    """Read no more, and so no longer notice the client leave."""
    return Plain("stop_reading")


def answered() -> Step:
    """Count the request as answered; whatever follows is bad manners, not an answer."""
    return Plain("answered")


def _as_tuple(steps: Iterable[Step]) -> tuple[Step, ...]:
    return tuple(steps)


@attrs.frozen
class Script:
    """What to do for one request. One that runs to its end has answered.

    `before_body` starts it at the request's head, with the body unread; the connection ends with
    it.
    """

    steps: tuple[Step, ...] = attrs.field(converter=_as_tuple)
    before_body: bool = attrs.field(default=False, kw_only=True)

    def then(self, *steps: Step) -> Script:
        return attrs.evolve(self, steps=(*self.steps, *steps))


@attrs.define(eq=False, kw_only=True)
class LedgerEntry:
    """One request, from its head on.

    `ended` is "hung" while the script hangs, "closed" and "reset" when the engine hung up first,
    "stopped" when the engine itself was cancelled. `client_left_at` is also set when the client
    leaves between the answer and the end of the script; that is not abandonment.
    """

    request_id: str
    attempt: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    connection: int
    received_at: float
    ended: Ended = "running"
    client_left_at: float | None = None
    over: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = Script | Callable[[LedgerEntry], Script]


def as_asked(entry: LedgerEntry) -> Script:
    """One word, streamed if the request says so, with usage if it asks for that."""
    asked = entry.json
    if not asked.get("stream"):
        return whole_chat("ok")
    options = asked.get("stream_options") or {}
    return stream_chat(["ok"], usage=(1, 1) if options.get("include_usage") else None)


def _routes() -> dict[tuple[str, str], Script]:
    models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
    return {
        ("GET", "/health"): status(200, b'{"status":"ok"}'),
        ("GET", "/v1/models"): status(200, _dump(models)),
    }


def _as_deque(scripts: Iterable[Answer]) -> deque[Answer]:
    return deque(scripts)


@attrs.define(eq=False)
class ScriptedEngine:
    """Each POST takes the next of `scripts`, then `default`; `routes` come first.

    `connections` counts every one so far, `open_connections` those open now. `in_flight`,
    `max_in_flight` and `abandoned` count POSTs only, so that probes do not blur them.
    """

    scripts: deque[Answer] = attrs.field(factory=deque, converter=_as_deque)
    default: Answer = attrs.field(default=as_asked)
    routes: dict[tuple[str, str], Script] = attrs.field(factory=_routes)
    ledger: list[LedgerEntry] = attrs.field(factory=list, init=False)
    connections: int = attrs.field(default=0, init=False)
    open_connections: int = attrs.field(default=0, init=False)
    in_flight: int = attrs.field(default=0, init=False)
    max_in_flight: int = attrs.field(default=0, init=False)
    abandoned: int = attrs.field(default=0, init=False)
    _attempts: Counter[str] = attrs.field(factory=Counter, init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def posts(self) -> list[LedgerEntry]:
        return [entry for entry in self.ledger if entry.method == "POST"]

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something about this engine: `wait_until(lambda: engine.in_flight == 3)`."""
        await trio.lowlevel.checkpoint()
        while not holds():
            await self._changed.wait()

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Answer one connection's requests, one after the other, until either side hangs up."""
        self.connections += 1
        self.open_connections += 1
        self._tell()
        try:
            await self._converse(_Connection(stream, self.connections))
        finally:
            self.open_connections -= 1
            self._tell()
            await trio.aclose_forcefully(stream)

    async def _converse(self, connection: _Connection) -> None:
        while (block := await connection.read_head()) is not None:
            entry = self._enter(block, connection)
            try:
                parting = await self._answer(connection, entry)
            finally:
                connection.take_body(entry)
                self._settle(entry, _cut_short(entry))
            if parting == "reset":
                await reset_stream(connection.stream)
            if parting != "answered" or entry.headers.get("connection") == "close":
                return

    async def _answer(self, connection: _Connection, entry: LedgerEntry) -> Ended:
        """How to part with this connection: only "answered" keeps it."""
        answer = self._choose(entry)
        if isinstance(answer, Script) and answer.before_body:
            parting = await self._play(answer, connection, entry)
            return "closed" if parting == "answered" else parting
        if not await connection.read_body(entry):
            self._left(entry)
            return "client_left"
        script = answer if isinstance(answer, Script) else answer(entry)
        return await self._play(script, connection, entry)

    def _choose(self, entry: LedgerEntry) -> Answer:
        if (route := self.routes.get((entry.method, entry.path))) is not None:
            return route
        if entry.method != "POST":
            return status(404, b'{"error":{"message":"no such path"}}')
        return self.scripts.popleft() if self.scripts else self.default

    async def _play(self, script: Script, connection: _Connection, entry: LedgerEntry) -> Ended:
        parting: Ended = "client_left"  # unless the script gets to say otherwise
        reading = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, connection, entry, reading, nursery.cancel_scope)
            parting = await self._perform(script, connection, entry, reading)
            self._settle(entry, parting)  # at once: leaving the nursery is a checkpoint
            nursery.cancel_scope.cancel(reason="the script ended")
        return parting

    async def _watch(
        self,
        connection: _Connection,
        entry: LedgerEntry,
        reading: trio.CancelScope,
        playing: trio.CancelScope,
    ) -> None:
        with reading:
            while await connection.receive():
                pass
            self._left(entry)
            playing.cancel(reason="the client left")

    async def _perform(
        self,
        script: Script,
        connection: _Connection,
        entry: LedgerEntry,
        reading: trio.CancelScope,
    ) -> Ended:
        for step in script.steps:
            match step:
                case Send(data):
                    try:
                        await connection.stream.send_all(data)
                    except trio.BrokenResourceError:
                        self._left(entry)
                        return "client_left"
                case Sleep(seconds):
                    await trio.sleep(seconds)
                case Wait(event):
                    await event.wait()
                case Tell(event):
                    event.set()
                case Plain("hang"):
                    await self._hang(entry)
                case Plain("stop_reading"):
                    reading.cancel(reason="the script stopped reading")
                case Plain("answered"):
                    self._settle(entry, "answered")
                case Plain("close"):
                    return "closed"
                case Plain("reset"):
                    return "reset"
        return "answered"

    async def _hang(self, entry: LedgerEntry) -> None:
        if entry.ended == "running":
            entry.ended = "hung"
            self._tell()
        await trio.sleep_forever()

    def _enter(self, block: bytes, connection: _Connection) -> LedgerEntry:
        start, pairs = parse_head(block)
        method, path, _ = start.split(" ")
        headers = dict(pairs)
        connection.expect_body(headers)
        request_id = headers.get("x-request-id", "")
        self._attempts[request_id] += 1
        entry = LedgerEntry(
            request_id=request_id,
            attempt=self._attempts[request_id],
            method=method,
            path=path,
            headers=headers,
            connection=connection.number,
            received_at=trio.current_time(),
        )
        self.ledger.append(entry)
        if method == "POST":
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        self._tell()
        return entry

    def _left(self, entry: LedgerEntry) -> None:
        if entry.client_left_at is None:
            entry.client_left_at = trio.current_time()
            self._tell()

    def _settle(self, entry: LedgerEntry, ended: Ended) -> None:
        """Close the entry's account; only the first call for an entry counts."""
        if entry.over:
            return
        entry.over = True
        entry.ended = ended
        if entry.method == "POST":
            self.in_flight -= 1
            self.abandoned += ended == "client_left"
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _cut_short(entry: LedgerEntry) -> Ended:
    """How a request ended whose script did not come to say."""
    if entry.client_left_at is not None:
        return "client_left"
    return "hung" if entry.ended == "hung" else "stopped"


class _Connection:
    """The reading side. Bytes wait here until a request claims them."""

    def __init__(self, stream: trio.abc.Stream, number: int) -> None:
        self.stream = stream
        self.number = number
        self._buffer = bytearray()
        self._framing: Framing = Sized(0)

    async def receive(self) -> bool:
        """False when the peer has closed or reset."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            return False
        self._buffer += data
        return bool(data)

    async def read_head(self) -> bytes | None:
        while (block := take_until(self._buffer, b"\r\n\r\n")) is None:
            if not await self.receive():
                return None
        return block

    def expect_body(self, headers: dict[str, str]) -> None:
        if "chunked" in headers.get("transfer-encoding", ""):
            self._framing = Chunked()
        else:
            self._framing = Sized(int(headers.get("content-length", "0")))

    def take_body(self, entry: LedgerEntry) -> bool:
        """Move what has arrived of the body to the entry; true once that is all of it."""
        entry.body += self._framing.take(self._buffer)
        return self._framing.finished

    async def read_body(self, entry: LedgerEntry) -> bool:
        """False when the peer left before the end of the body."""
        while not self.take_body(entry):
            if not await self.receive():
                return False
        return True


def status(code: int, body: bytes = b"", headers: Headers = ()) -> Script:
    """A whole response, JSON unless `headers` say otherwise."""
    return Script([send(_whole(code, body, headers))])


def whole_chat(text: str, usage: Usage | None = (1, 1)) -> Script:
    return status(200, _chat(text, usage))


def stream_chat(
    tokens: Iterable[str],
    *,
    usage: Usage | None = None,
    done: bool = True,
    finish: str | None = "stop",
    gap: float = 0.0,
) -> Script:
    """Server-sent events, a chunk each. `gap` passes between tokens, not before the first."""
    steps = _opening(tokens, gap)
    if finish is not None:
        steps.append(_event(_delta({}, finish)))
    if usage is not None:
        steps.append(_event(_object("chat.completion.chunk", [], usage)))
    if done:
        steps.append(_event(b"[DONE]"))
    return Script([*steps, send(_LAST_CHUNK)])


def html(code: int = 200) -> Script:
    page = b"<html><body>It works!</body></html>"
    return status(code, page, [("content-type", "text/html")])


def redirect(url: str, code: int = 302) -> Script:
    return status(code, b"", [("location", url)])


def empty() -> Script:
    """200 with a body of no bytes."""
    return status(200)


def half_body() -> Script:
    """A hundred bytes promised, five sent, then a FIN."""
    return Script([send(_head(200, [_JSON, ("content-length", "100")]) + b'{"id"'), close()])


def garbage() -> Script:
    return Script([send(b"\x00\xffno HTTP at all\r\n\r\n"), close()])


def cut_after(n: int, *, mid_chunk: bool = False) -> Script:
    """`n` tokens, then a FIN: between two chunks, or in the middle of one."""
    rest = [send(b'40\r\ndata: {"id"')] if mid_chunk else []
    return Script([*_opening(_words(n)), *rest, close()])


def stall_after(n: int) -> Script:
    """`n` tokens, then silence; the head alone for 0."""
    return Script([*_opening(_words(n)), hang()])


def reset_after(n: int) -> Script:
    """`n` tokens, then a RST, which may overtake tokens that the client has not read yet."""
    return Script([*_opening(_words(n)), reset()])


def no_finish(n: int = 3) -> Script:
    """`n` tokens and a proper last chunk, but neither a finish reason nor [DONE]."""
    return stream_chat(_words(n), finish=None, done=False)


def lingers(n: int = 3) -> Script:
    """A stream that hangs behind its [DONE], without the last chunk."""
    whole = stream_chat(_words(n))
    return Script([*whole.steps[:-1], answered(), hang()])


def error_event(n: int = 1, message: str = "the engine gave up") -> Script:
    """`n` tokens, an error in place of the next, and a proper last chunk."""
    error = {"error": {"message": message, "type": "server_error", "code": 500}}
    return Script([*_opening(_words(n)), _event(_dump(error)), send(_LAST_CHUNK)])


def surplus() -> Script:
    """A complete second response in the same segment, which must reach nobody."""
    return Script([send(_whole(200, _chat("mine")) + _whole(200, _chat("surplus")))])


def early_bytes_on_idle(delay: float = 1.0) -> Script:
    """A good answer, and `delay` later a response to a request nobody made."""
    unasked = send(_whole(200, _chat("unasked")))
    return whole_chat("mine").then(answered(), sleep(delay), unasked)


def switching_protocols() -> Script:
    upgrade = [("upgrade", "websocket"), ("connection", "upgrade")]
    return Script([send(_head(101, upgrade)), answered(), hang()])


def continues(n: int, code: int = 103) -> Script:
    """`n` interim responses, then a good answer."""
    return Script([send(_head(code, []) * n), *whole_chat("ok").steps])


def close_delimited(text: str = "ok") -> Script:
    """A whole answer without a length, ended by the FIN."""
    return Script([send(_head(200, [_JSON]) + _chat(text, (1, 1))), answered(), close()])


def loading() -> Script:
    """What llama.cpp says while it reads its model."""
    error = {"message": "Loading model", "type": "unavailable_error", "code": 503}
    return status(503, _dump({"error": error}))


def early_status(code: int, body: bytes = b"{}") -> Script:
    """Answers at the request's head, then reads on until the client leaves."""
    steps = [send(_whole(code, body, [("connection", "close")])), answered(), hang()]
    return Script(steps, before_body=True)


async def serve_tcp(engine: ScriptedEngine, nursery: trio.Nursery, host: str = "127.0.0.1") -> int:
    """Serve on a real socket for the nursery's life; the port."""
    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, engine.serve, 0, host=host)
    )
    port: int = listeners[0].socket.getsockname()[1]
    return port


_JSON = ("content-type", "application/json")
_LAST_CHUNK = b"0\r\n\r\n"


def _head(code: int, headers: Headers) -> bytes:
    lines = [f"HTTP/1.1 {code} {http.client.responses.get(code, 'Scripted')}"]
    lines += (f"{name}: {value}" for name, value in headers)
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _whole(code: int, body: bytes, headers: Headers = ()) -> bytes:
    given = list(headers)
    if all(name.lower() != "content-type" for name, _ in given):
        given.append(_JSON)
    return _head(code, [*given, ("content-length", str(len(body)))]) + body


def _opening(tokens: Iterable[str], gap: float = 0.0) -> list[Step]:
    """The head of a stream, and its tokens; the role comes with the first."""
    stream = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]
    steps = [send(_head(200, stream))]
    for number, token in enumerate(tokens):
        if number and gap:
            steps.append(sleep(gap))
        role = {} if number else {"role": "assistant"}
        steps.append(_event(_delta({**role, "content": token})))
    return steps


def _words(n: int) -> list[str]:
    return [f"tok{number} " for number in range(n)]


def _event(data: bytes) -> Step:
    event = b"data: " + data + b"\n\n"
    return send(b"%x\r\n%b\r\n" % (len(event), event))


def _delta(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _object("chat.completion.chunk", [choice])


def _chat(text: str, usage: Usage | None = None) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return _object("chat.completion", [choice], usage)


def _object(kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
    document: dict[str, Any] = {
        "id": "chatcmpl-scripted",
        "object": kind,
        "created": 1,
        "model": MODEL,
        "choices": choices,
    }
    if usage is not None:
        prompt, completion = usage
        document["usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
    return _dump(document)


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
