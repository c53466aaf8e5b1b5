"""Closing a connection without destroying what is on its way to the client."""

from __future__ import annotations

from contextlib import suppress

import trio

_READ = 64 * 1024
_MOST = 32 * 2**20
_WITHIN = 2.0  # seconds


async def linger(stream: trio.abc.Stream, read: trio.abc.ReceiveStream | None = None) -> None:
    """Let the client read our last words before *stream* is closed, by the caller.

    Closing a socket with unread bytes in it sends a reset, which may destroy what is on its way
    to the client.  So say that we are done, and read on for a moment.

    :param read: where to read, if not below *stream*.
    """
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream  # TLS itself cannot be closed by halves
    if not isinstance(stream, trio.abc.HalfCloseableStream):
        return
    most = _MOST
    with (
        trio.move_on_after(_WITHIN),
        suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError),
    ):
        await stream.send_eof()
        while most > 0 and (data := await (read or stream).receive_some(_READ)):
            most -= len(data)
