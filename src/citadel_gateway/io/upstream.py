"""Requests to endpoints: ask for a whole answer, or relay a stream.

What goes over the wire is in :mod:`.target`, the life of an attempt in :mod:`.attempt`, and what
its failure means in :mod:`.failures`.
"""

from __future__ import annotations

import attrs

from citadel_gateway.io.answer import read_answer
from citadel_gateway.io.assembled import AssembledAnswer
from citadel_gateway.io.attempt import Attempt, Progress
from citadel_gateway.io.buffers import Buffers
from citadel_gateway.io.connection import Connection
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.pump import Pump
from citadel_gateway.io.stream_relay import Sink, StreamRelay
from citadel_gateway.io.target import Call, Target, Timing
from citadel_gateway.wire.openai_answer import Usage, check_whole_answer
from citadel_gateway.wire.openai_stream import StreamReader
from citadel_gateway.wire.seam import Seam

MAX_ANSWER = 64 * 2**20


@attrs.frozen(kw_only=True)
class WholeAnswer:
    body: bytes
    usage: Usage


@attrs.define(eq=False)
class UpstreamClient:
    """Sends requests to endpoints over the shared pool.

    Whole answers are counted in *buffers*, as their requests'; they are given back there when a
    request has ended.
    """

    pool: ConnectionPool
    deadlines: Deadlines
    pump: Pump
    buffers: Buffers = attrs.field(factory=Buffers)

    async def ask(
        self, target: Target, call: Call, timing: Timing, progress: Progress
    ) -> WholeAnswer:
        """A whole answer, complete and valid.

        Raises :class:`UpstreamFailure`, or ``NoRoom`` for it.
        """
        attempt = Attempt(self.pool, self.deadlines, target, call, timing, progress)

        async def read(connection: Connection) -> WholeAnswer:
            attempt.expect_whole()
            body = await read_answer(connection, MAX_ANSWER, self.buffers, progress)
            return WholeAnswer(body=body, usage=check_whole_answer(call.request.kind, body))

        held = progress.held
        try:
            return await attempt.run(read)
        except UpstreamFailure:
            self.buffers.let_go(progress, held)
            raise

    async def ask_for_stream(
        self, target: Target, call: Call, timing: Timing, progress: Progress
    ) -> WholeAnswer:
        """The same from an engine that is asked for a stream, and so can be left at any time."""
        attempt = Attempt(self.pool, self.deadlines, target, call, timing, progress)
        reader = StreamReader(expected=call.request.choices)
        answer = AssembledAnswer(attempt, reader, MAX_ANSWER, self.buffers)
        held = progress.held
        try:
            body = await attempt.run(answer.run)
        except UpstreamFailure:
            self.buffers.let_go(progress, held)
            raise
        return WholeAnswer(body=body, usage=reader.final_usage())

    async def relay(
        self,
        target: Target,
        call: Call,
        timing: Timing,
        progress: Progress,
        sink: Sink,
        reader: StreamReader,
        seam: Seam | None = None,
    ) -> None:
        """Relay a stream to *sink* until it is complete; *reader* reads along.

        :param seam: it goes on with a stream that another endpoint began.

        Raises :class:`UpstreamFailure`; once that is ``committed``, the stream was cut.
        """
        attempt = Attempt(self.pool, self.deadlines, target, call, timing, progress)
        await attempt.run(StreamRelay(attempt, sink, reader, self.pump, seam).run)
