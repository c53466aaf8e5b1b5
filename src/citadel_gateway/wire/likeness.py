"""Recognising an event that differs from the last one in nothing but its text.

Of a stream's thousands of events all but a few are the same JSON with another string in one place.
Once one has been parsed, the next is known to mean the same if everything around that string is the
same to the byte, and the string is a plain one.  Looking costs a fraction of parsing.
"""

from __future__ import annotations

import re

import attrs

_TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning)": ?"()[^"\\]*"')
_SPECIAL = re.compile(rb'["\\\x00-\x1f]')
_HOPELESS = 8  # misses in a row, after which a stream is taken to have no two events alike


@attrs.define(eq=False)
class Likeness:
    """What surrounds the text of an event, learnt from one that was parsed."""

    _before: bytes = attrs.field(default=b"", init=False)
    _after: bytes = attrs.field(default=b"", init=False)
    _around: int = attrs.field(default=0, init=False)
    _misses: int = attrs.field(default=0, init=False)

    def learn(self, event: bytes) -> None:
        """Expect events like *event*: it adds text to one choice, and says nothing else."""
        self._before = b""
        if self._misses < _HOPELESS and (match := _TEXT.search(event)) is not None:
            self._misses += 1
            self._before, self._after = event[: match.start(1)], event[match.end() - 1 :]
            self._around = len(self._before) + len(self._after)

    def forget(self) -> None:
        """Expect nothing: what comes must be parsed."""
        self._before = b""

    def has(self, event: bytes) -> bool:
        """Whether *event* is what was expected but for its text, and has some."""
        before = self._before
        if (
            not before
            or len(event) <= self._around
            or not event.startswith(before)
            or not event.endswith(self._after)
        ):
            return False
        text = event[len(before) : len(event) - len(self._after)]
        if _SPECIAL.search(text) is not None or not (text.isascii() or _is_utf8(text)):
            return False
        self._misses = 0
        return True


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
