"""What an engine answered: is it whole, is it an error, what did it cost?

Answers are looked into, never rewritten; only errors are put into OpenAI's shape, once, whatever
dialect the engine speaks.
"""

from __future__ import annotations

import enum
from typing import Any

import attrs
import orjson

from citadel_gateway.errors import error_body
from citadel_gateway.wire.likeness import Likeness
from citadel_gateway.wire.openai_request import Kind
from citadel_gateway.wire.sse import event_data

_MAX_MALFORMED = 5  # in a row


@attrs.frozen
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NotAnAnswer(Exception):
    """The engine said 200 and then something that is no answer."""


@attrs.frozen
class EngineError(Exception):
    """The engine reported an error, with or without an error status."""

    status: int
    message: str
    kind: str
    code: str | None
    param: str | None

    def body(self) -> bytes:
        return error_body(self.message, self.kind, self.code, self.param)


def check_whole_answer(kind: Kind, body: bytes) -> Usage:
    """Usage of a complete answer.  Raises :class:`NotAnAnswer` or :class:`EngineError`."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        what = "an empty body" if not body else "something that is not JSON"
        raise NotAnAnswer(f"the upstream answered 200 with {what}") from None
    if not isinstance(answer, dict):
        raise NotAnAnswer("the upstream answered 200 with JSON that is not an object")
    if is_error(answer):
        raise parse_error(502, body)
    wanted = "data" if kind is Kind.EMBEDDINGS else "choices"
    found = answer.get(wanted)
    if not isinstance(found, list) or not found:
        raise NotAnAnswer(f"the upstream's answer has no list of {wanted}, or an empty one")
    return parse_usage(answer.get("usage"))


def is_error(answer: dict[str, Any]) -> bool:
    return bool(answer.get("error")) or answer.get("object") == "error"


def raise_if_error(body: bytes) -> None:
    """Raises :class:`EngineError` if *body* is an error that came with a good status."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return
    if isinstance(answer, dict) and is_error(answer):
        raise parse_error(502, body)


def parse_usage(usage: Any) -> Usage:
    """Token counts; absent or absurd ones are zero."""
    if not isinstance(usage, dict):
        return Usage()
    return Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int:
    sane = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
    return value if sane else 0


def parse_error(status: int, body: bytes) -> EngineError:
    """An engine's error in OpenAI's terms.

    Understood are ``{"error": {...}}``, ``{"error": "text"}``, vLLM's older
    ``{"object": "error", ...}``, FastAPI's ``{"detail": ...}``, and plain text.

    :param status: what to answer with if the body names no better one.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = _plain_text(body)
    error: Any = answer
    if isinstance(answer, dict):
        error = answer.get("error") or answer.get("detail") or answer
    if isinstance(error, list):
        error = orjson.dumps(error).decode()  # FastAPI's list of what is wrong with which field
    if isinstance(error, str) and error:
        error = {"message": error}
    if not isinstance(error, dict):
        error = {"message": f"The upstream answered with status {status} and no explanation."}
    return _engine_error(status, error)


def _plain_text(body: bytes) -> str:
    """*body* as an explanation; markup, as proxies send it, is none."""
    text = body.decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text


def _engine_error(status: int, error: dict[str, Any]) -> EngineError:
    code = error.get("code")
    if isinstance(code, int) and 400 <= code <= 599 and status in {200, 502}:
        status = code  # inside a 200, the code is the only status there is
    kind = error.get("type")
    default = "invalid_request_error" if status < 500 else "server_error"
    message = error.get("message")
    message = message if isinstance(message, str) and message else f"The upstream failed: {error}"
    param = error.get("param")
    if kind == "exceed_context_size_error" or "maximum context length" in message:
        kind, code, param = "invalid_request_error", "context_length_exceeded", "messages"
    return EngineError(
        status=status,
        message=message[:4000],
        kind=kind if isinstance(kind, str) and kind else default,
        code=code if isinstance(code, str) and code else None,
        param=param if isinstance(param, str) else None,
    )


class EventKind(enum.Enum):
    """What an event means for the answer that it is part of."""

    QUIET = "quiet"  # a comment, a role: nothing that a client could not do without
    CONTENT = "content"  # text, reasoning, a tool call, or an end: commits the answer
    USAGE = "usage"  # the chunk that carries nothing but token counts
    DONE = "done"
    MALFORMED = "malformed"


@attrs.define(eq=False)
class StreamReader:
    """Reads along while a stream is relayed: has every choice come to its end?

    :param expected: how many choices were asked for.
    """

    expected: int = 1

    usage: Usage | None = attrs.field(default=None, init=False)
    content_events: int = attrs.field(default=0, init=False)
    malformed: int = attrs.field(default=0, init=False)
    done: bool = attrs.field(default=False, init=False)
    _seen: set[int] = attrs.field(factory=set, init=False)
    _finished: set[int] = attrs.field(factory=set, init=False)
    _malformed_in_a_row: int = attrs.field(default=0, init=False)
    _likeness: Likeness = attrs.field(factory=Likeness, init=False)

    def knows(self, event: bytes) -> bool:
        """Whether *event* is one more like the last, with content; if so, it has been read."""
        if self._likeness.has(event):
            self.content_events += 1
            return True
        return False

    def read(self, event: bytes) -> EventKind:
        """Raises :class:`EngineError` for an error event, :class:`NotAnAnswer` for nonsense."""
        data = event_data(event)
        if data is None:
            return EventKind.QUIET
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            if data.strip() == b"[DONE]":
                self.done = True
                return EventKind.DONE
            return self._note_malformed()
        if not isinstance(chunk, dict):
            return self._note_malformed()
        self._malformed_in_a_row = 0
        if is_error(chunk):
            raise parse_error(502, data)
        kind = self._read_chunk(chunk)
        if kind is EventKind.CONTENT and _only_adds_text(chunk):
            self._likeness.learn(event)
        else:
            self._likeness.forget()
        return kind

    @property
    def is_whole(self) -> bool:
        """Every choice that began has ended, and nobody has said less than was asked for.

        An engine that closes with ``[DONE]`` is believed that it was asked for fewer.
        """
        enough = len(self._finished) >= (1 if self.done else self.expected)
        return enough and self._finished >= self._seen

    def final_usage(self) -> Usage:
        """What the engine counted, else one completion token for each event with content."""
        return self.usage or Usage(0, self.content_events)

    def _read_chunk(self, chunk: dict[str, Any]) -> EventKind:
        usage = chunk.get("usage")
        if usage is not None and isinstance(usage, dict):
            self.usage = parse_usage(usage)
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            return EventKind.USAGE if usage is not None else EventKind.QUIET
        says_something = False
        for choice in choices:
            if isinstance(choice, dict) and self._read_choice(choice):
                says_something = True
        return EventKind.CONTENT if says_something else EventKind.QUIET

    def _read_choice(self, choice: dict[str, Any]) -> bool:
        """Whether the choice says anything."""
        index = choice.get("index", 0)
        if not isinstance(index, int):
            index = 0
        self._seen.add(index)
        delta = choice.get("delta")
        has_content = bool(choice.get("text"))
        if isinstance(delta, dict):
            # Anything but a role: reasoning, a tool call, whatever engines come up with.
            for name, value in delta.items():
                if value and name != "role":
                    has_content = True
        self.content_events += has_content
        if choice.get("finish_reason"):  # some engines send "" with every chunk
            self._finished.add(index)
            return True
        if has_content and index in self._finished:
            self._finished.discard(index)  # it was not the end after all
        return has_content

    def _note_malformed(self) -> EventKind:
        self.malformed += 1
        self._malformed_in_a_row += 1
        if self._malformed_in_a_row > _MAX_MALFORMED:
            raise NotAnAnswer(f"the upstream sent {self._malformed_in_a_row} malformed events")
        return EventKind.MALFORMED


def _only_adds_text(chunk: dict[str, Any]) -> bool:
    choices = chunk["choices"]
    return (
        len(choices) == 1
        and not choices[0].get("finish_reason")
        and not isinstance(chunk.get("usage"), dict)
    )
