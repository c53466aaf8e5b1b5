"""Server-sent events: cut a byte stream into whole events without changing a byte of it."""

from __future__ import annotations

import re

import attrs

MAX_EVENT = 2**20

_BLANK_LINE = re.compile(rb"(?:(?>\r\n|\r|\n)){2}")


class EventTooLarge(Exception):
    """An event went on for more than :data:`MAX_EVENT` bytes."""


@attrs.define(eq=False)
class EventSplitter:
    """Whole events as they were received; what is not yet whole is held back."""

    _tail: bytes = attrs.field(default=b"", init=False)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held back."""
        return not self._tail

    def feed(self, data: bytes) -> list[bytes]:
        """The events that *data* completes, each with the blank line that ends it.

        Joined, they are the input, byte for byte.  Raises :class:`EventTooLarge`.
        """
        if self._tail:
            data = self._tail + data
        elif data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            return [data]  # one event as engines send it, which is nearly always
        if b"\r" in data:
            events = self._split_any(data)
        else:
            *whole, self._tail = data.split(b"\n\n")
            events = [event + b"\n\n" for event in whole]
        if len(self._tail) > MAX_EVENT:
            raise EventTooLarge(f"an event is larger than {MAX_EVENT} bytes")
        return events

    def rest(self) -> bytes:
        """What is left when the stream has ended: an event without its blank line."""
        rest, self._tail = self._tail, b""
        return rest

    def _split_any(self, data: bytes) -> list[bytes]:
        events, start = [], 0
        for match in _BLANK_LINE.finditer(data):
            if match.end() == len(data) and data.endswith(b"\r"):
                break  # the other half of a CRLF may be on its way
            events.append(data[start : match.end()])
            start = match.end()
        self._tail = data[start:]
        return events


def event_data(event: bytes) -> bytes | None:
    """The data of an event, its lines joined; ``None`` for a comment or an event without data."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]  # what every engine sends
    lines = [line for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def encode_event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


DONE = encode_event(b"[DONE]")
