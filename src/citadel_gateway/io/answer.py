"""A whole answer from an engine, counted while it is read."""

from __future__ import annotations

from citadel_gateway.io.buffers import STEP, UNCOUNTED, Buffers, Holder
from citadel_gateway.io.connection import Connection
from citadel_gateway.wire.headers import first
from citadel_gateway.wire.http1_response import BadResponse


async def read_answer(
    connection: Connection, limit: int, buffers: Buffers, holder: Holder
) -> bytes:
    """The body of an answer, held in *buffers*.

    While there is no room the engine has to wait with it: the work is done, and would be lost.

    Raises :class:`BadResponse` if it is larger than *limit*, and ``NoRoom``.
    """
    pieces, size, room = [], 0, UNCOUNTED
    while piece := await connection.read_body():
        pieces.append(piece)
        size += len(piece)
        announced = _announced(connection) if size > room else 0
        if max(size, announced) > limit:
            raise BadResponse(f"the upstream's answer is larger than {limit} bytes")
        if size > room:
            await buffers.wait_to_hold(holder, announced or STEP)
            room = announced or room + STEP
    return b"".join(pieces)


def _announced(connection: Connection) -> int:
    length = first(connection.response.headers, b"content-length")
    return int(length) if length is not None and length.isdigit() else 0
