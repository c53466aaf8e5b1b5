"""What kinds of HTTP/2 frames a client sends, before anybody works for them.

Only the nine bytes in front of each frame are looked at (RFC 9113, section 4.1).  What they say is
enough to tell work from noise: frames that carry nothing but have to be handled, streams that are
opened only to be reset (CVE-2023-44487), header blocks that do not end (CVE-2024-27316), frames so
long that whoever parses them would have to keep megabytes until their end.
"""

from __future__ import annotations

import attrs

LARGEST_FRAME = 2**14
"""Bytes of a frame that anybody may send without having been asked whether (section 4.2)."""

_PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
_DATA, _HEADERS, _RST_STREAM, _CONTINUATION = 0, 1, 3, 9
_END_STREAM, _END_HEADERS = 1, 4


@attrs.frozen
class Tally:
    """What some bytes brought.

    :param resets: streams that the client gave up.
    :param idle: frames that carry neither a request nor a piece of one.
    """

    resets: int
    idle: int


@attrs.define(eq=False)
class FrameCounter:
    """Follows the frames of one client through the bytes of its connection."""

    longest: int = attrs.field(default=0, init=False)  # bytes of the longest frame so far
    block: int = attrs.field(default=0, init=False)  # bytes of a header block that has not ended
    in_head: bool = attrs.field(default=False, init=False)
    _skip: int = attrs.field(default=_PREFACE, init=False)  # bytes until the next frame begins
    _begun: bytes = attrs.field(default=b"", init=False)  # of the nine

    def feed(self, data: bytes) -> Tally:
        resets = idle = 0
        data, at = self._begun + data, self._skip
        while at + 9 <= len(data):
            length = int.from_bytes(data[at : at + 3], "big")
            kind, flags = data[at + 3], data[at + 4]
            at += 9 + length
            if length > self.longest:
                self.longest = length
            if kind in {_HEADERS, _CONTINUATION}:
                self.block = length if kind == _HEADERS else self.block + length
                self.in_head = not flags & _END_HEADERS
                idle += not length
            elif kind == _RST_STREAM:
                resets += 1
            elif kind != _DATA or not (length or flags & _END_STREAM):
                idle += 1
        self._begun = data[at:]
        self._skip = max(0, at - len(data))
        return Tally(resets, idle)
