"""Reading along while a stream of events is relayed: what each means, and whether all is there."""

from __future__ import annotations

import enum
from typing import Any

import attrs
import orjson

from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.likeness import Likeness
from citadel_gateway.wire.openai_answer import (
    NotAnAnswer,
    Usage,
    is_error,
    parse_error,
    parse_usage,
)
from citadel_gateway.wire.sse import event_data

_MAX_MALFORMED = 5  # in a row


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
    :param delivered: told of those events that :meth:`knows` recognises.
    """

    expected: int = 1
    delivered: Delivered | None = None

    usage: Usage | None = attrs.field(default=None, init=False)
    content_events: int = attrs.field(default=0, init=False)
    malformed: int = attrs.field(default=0, init=False)
    done: bool = attrs.field(default=False, init=False)
    chunk: dict[str, Any] | None = attrs.field(default=None, init=False)  # of the last event read
    _seen: set[int] = attrs.field(factory=set, init=False)
    _finished: set[int] = attrs.field(factory=set, init=False)
    _malformed_in_a_row: int = attrs.field(default=0, init=False)
    _likeness: Likeness = attrs.field(factory=Likeness, init=False)

    def knows(self, event: bytes) -> bool:
        """Whether *event* is one more like the last, with content; if so, it has been read."""
        text = self._likeness.text_of(event)
        if not text:
            return False
        self.content_events += 1
        if self.delivered is not None:
            self.delivered.add(text)
        return True

    def read(self, event: bytes) -> EventKind:
        """Raises :class:`EngineError` for an error event, :class:`NotAnAnswer` for nonsense."""
        self._likeness.forget()
        self.chunk = None
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
        if kind is EventKind.CONTENT and (text := _only_text(chunk)):
            self._likeness.learn(event, text)
        self.chunk = chunk
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


def _only_text(chunk: dict[str, Any]) -> str:
    """The text that *chunk* adds to its only choice, if that is all that it says."""
    (choice, *others) = chunk["choices"]
    if others or choice.get("finish_reason") or isinstance(chunk.get("usage"), dict):
        return ""
    delta = choice.get("delta")
    said = [choice["text"]] if choice.get("text") else []
    if isinstance(delta, dict):
        said += [value for name, value in delta.items() if value and name != "role"]
    return said[0] if len(said) == 1 and isinstance(said[0], str) else ""
