"""Recognising an event that differs from the last one in nothing but its text.

Of a stream's thousands of events all but a few are the same JSON with another string in one place.
Once one has been parsed, the next is known to mean the same if everything around that string is the
same to the byte, and the string is a plain one.  Looking costs a fraction of parsing.
"""

from __future__ import annotations

import re

import attrs

_SPECIAL = re.compile(rb'["\\\x00-\x1f]')
_HOPELESS = 8  # misses in a row, after which a stream is taken to have no two events alike


@attrs.define(eq=False)
class Likeness:
    """What surrounds the text of an event, learnt from one that was parsed."""

    _before: bytes = attrs.field(default=b"", init=False)
    _after: bytes = attrs.field(default=b"", init=False)
    _around: int = attrs.field(default=0, init=False)
    _misses: int = attrs.field(default=0, init=False)

    def learn(self, event: bytes, text: str) -> None:
        """Expect events like *event*, which adds *text* to one choice and says nothing else."""
        self._before = b""
        if self._misses >= _HOPELESS:
            return
        value = b'"%b"' % text.encode()
        for colon in (b":", b": "):
            at = event.find(colon + value)
            if at >= 0:
                break
        else:
            return  # it has escapes
        at += len(colon) + 1
        if event.find(value, at) >= 0:
            return  # the same stands in two places
        self._misses += 1
        self._before, self._after = event[:at], event[at + len(value) - 2 :]
        self._around = len(self._before) + len(self._after)

    def forget(self) -> None:
        """Expect nothing: what comes must be parsed."""
        self._before = b""

    def text_of(self, event: bytes) -> bytes:
        """The text of *event* if it is what was expected but for that; else nothing."""
        before = self._before
        if (
            not before
            or len(event) <= self._around
            or not event.startswith(before)
            or not event.endswith(self._after)
        ):
            return b""
        text = event[len(before) : len(event) - len(self._after)]
        if _SPECIAL.search(text) is not None or not (text.isascii() or _is_utf8(text)):
            return b""
        self._misses = 0
        return text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
