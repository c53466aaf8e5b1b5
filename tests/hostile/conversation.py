"""Send bytes in some way, and find out what became of them."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from tests.hostile.engines import Lane
from tests.hostile.judge import Outcome
from tests.hostile.oracle import Reading
from tests.hostile.responses import split_responses
from tests.hostile.wire import Peer

PATIENCE = 6.0  # longer than every clock of the server
QUIET = 0.03  # after the last answer that is due, for one that is not
_HALFWAY = 0.25  # for the refusal of what is not complete, which need not come


async def converse(
    port: int,
    lane: Lane,
    pieces: Sequence[bytes],
    reading: Reading,
    *,
    gap: float = 0.0,
    whole: bool = False,
    stray: Lane | None = None,
) -> Outcome:
    """Send *pieces* with a *gap* between them, and read until nothing more is to be expected.

    :param whole: for an incomplete request, wait until the server loses patience.
    """
    lane.forget()
    async with await Peer.connect(port) as peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send, peer, pieces, gap)
            await _read(peer, reading, whole)
            nursery.cancel_scope.cancel(reason="the conversation is over")
        if peer.ended == "open":
            peer.reset()
    return Outcome(bytes(peer.data), peer.ended, tuple(lane.take()))


async def _send(peer: Peer, pieces: Sequence[bytes], gap: float) -> None:
    for i, piece in enumerate(pieces):
        if i and gap:
            await trio.sleep(gap)
        if not await peer.send(piece):
            return


async def _read(peer: Peer, reading: Reading, whole: bool) -> None:
    methods = [r.method for r in reading.requests]
    closes = reading.end in {"refused", "closed"} or (reading.end == "incomplete" and whole)
    with trio.move_on_after(PATIENCE) as patience:
        while await peer.receive():
            if closes or not _is_due_over(bytes(peer.data), methods):
                patience.deadline = trio.current_time() + PATIENCE
                continue
            wait = _HALFWAY if reading.end == "incomplete" else QUIET
            patience.deadline = min(patience.deadline, trio.current_time() + wait)
        return
    # Out of patience: `peer.ended` says that it is still open.


def _is_due_over(data: bytes, methods: Sequence[bytes]) -> bool:
    """Whether as many whole answers have come as there are requests, or the last one there is."""
    if data.count(b"HTTP/1.1 ") < len(methods) and b"connection: close" not in data:
        return False  # said at once, as reading all of it again and again would take its time
    try:
        final = [r for r in split_responses(data, methods) if r.status >= 200 and r.complete]
    except ValueError:
        return True
    return len(final) >= len(methods) and not any(r.closes for r in final)
