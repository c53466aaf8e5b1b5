"""A whole answer that is streamed to us, and to the client in one piece.

Some engines do not notice that the client of a whole answer has left, and work on it to the end.
They do notice when they cannot send the next word of a stream.
"""

from __future__ import annotations

import attrs

from citadel_gateway.io.attempt import Attempt
from citadel_gateway.io.buffers import STEP, Buffers
from citadel_gateway.io.connection import Connection
from citadel_gateway.io.stream_relay import check_is_stream, read_to_end
from citadel_gateway.wire.assembly import Assembly
from citadel_gateway.wire.http1_response import BadResponse, CutShort
from citadel_gateway.wire.openai_stream import StreamReader
from citadel_gateway.wire.sse import EventSplitter


@attrs.define(eq=False)
class AssembledAnswer:
    """One stream that is read to its end.

    :param limit: bytes of events, which are larger than the answer.
    """

    attempt: Attempt
    reader: StreamReader
    limit: int
    buffers: Buffers
    _splitter: EventSplitter = attrs.field(factory=EventSplitter, init=False)
    _assembly: Assembly = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._assembly = Assembly(self.attempt.call.request.kind)

    async def run(self, connection: Connection) -> bytes:
        """The answer's body; raises what the upstream did wrong."""
        await check_is_stream(connection)
        self.attempt.expect_whole()
        size, room = 0, STEP  # nearly all of it are frames, which are thrown away
        while not self.reader.done and (data := await connection.read_body()):
            size += len(data)
            if size > self.limit:
                raise BadResponse(f"the upstream's answer is larger than {self.limit} bytes")
            if size > room:
                await self.buffers.wait_to_hold(self.attempt.progress, STEP)
                room += STEP
            for event in self._splitter.feed(data):
                self._take_in(event)
        if rest := self._splitter.rest().strip():
            self._take_in(rest + b"\n\n")
        if not self.reader.is_whole:
            raise CutShort("the upstream ended the stream before its answer did", started=True)
        await read_to_end(connection)
        return self._assembly.body()

    def _take_in(self, event: bytes) -> None:
        self.reader.read(event)
        if self.reader.chunk is not None:
            self._assembly.add(self.reader.chunk)
