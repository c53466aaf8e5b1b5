"""Too many, too slow, too patient: floods, silence, and readers that stop."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from tests.hostile.process import CLOCKS
from tests.hostile.responses import Response, split_responses
from tests.hostile.siege import Siege
from tests.hostile.wire import CHAT, Peer, chat_body, chunked, chunks, get, post

_SLACK = 1.0  # seconds: the machine is busy


async def play_floods(siege: Siege, *, size: float = 1.0) -> None:
    await _connect_and_leave(siege, int(2000 * size))
    async with trio.open_nursery() as nursery:
        for name, data, count in (
            ("says nothing", b"", 500),
            ("half a request line", b"POST /v1/ch", 500),
            ("half a head", bytes(get())[:-2], 300),
            ("half a body", bytes(post(b" " * 100))[:-50], 300),
        ):
            nursery.start_soon(_hold, siege, name, data, int(count * size))
    await _many_at_once(siege, int(300 * size))


async def _connect_and_leave(siege: Siege, count: int) -> None:
    async def visit(number: int) -> None:
        for i in range(number):
            peer = await Peer.connect(siege.port)
            peer.reset() if i % 2 else peer.close()

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(visit, count // 20)
    siege.report.count("connections that leave at once", count // 20 * 20)


async def _hold(siege: Siege, name: str, data: bytes, count: int) -> None:
    """Each is cut when its clock runs out, and says so only where something had begun."""
    peers = [await Peer.connect(siege.port) for _ in range(count)]
    try:
        for peer in peers:
            if data:
                await peer.send(data)
        began = trio.current_time()
        patience = max(CLOCKS["header_timeout"], CLOCKS["body_timeout"]) + 2 + _SLACK + count / 50
        with trio.move_on_after(patience):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(peer.receive_to_the_end)
        took = trio.current_time() - began
        if left := sum(peer.ended == "open" for peer in peers):
            siege.report.found(name, f"{left} of {count} are still held after {took:.1f} s", data)
        for peer in peers:
            statuses = [r.status for r in split_responses(bytes(peer.data))]
            if peer.ended == "fin" and statuses != ([408] if data else []):
                siege.report.found(name, f"answered {statuses}", data, bytes(peer.data))
                break
        siege.report.count("connections held", count)
    finally:
        for peer in peers:
            peer.close()


async def _many_at_once(siege: Siege, count: int) -> None:
    """Good requests, all on connections of their own, each by a client that comes only once."""
    lane = siege.lanes[0]
    data = bytes(post(chat_body(lane.model, "crowd")).plus(b"Connection: close"))
    failed: list[bytes] = []

    async def visit() -> None:
        async with await Peer.connect(siege.port) as peer:
            await peer.send(data)
            with trio.move_on_after(20):
                await peer.receive_to_the_end()
            answers = _answers(peer)
            if [r.status for r in answers] != [200] or peer.ended != "fin":
                failed.append(bytes(peer.data))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(visit)
    siege.report.count("good requests at once", count)
    if failed:
        siege.report.found("a crowd", f"{len(failed)} of {count} failed", data, failed[0])


async def play_slowness(siege: Siege, *, readers: int = 8) -> None:
    """Everything that takes a clock to run out, all at the same time."""
    cases: list[Callable[[Siege], Awaitable[None]]] = [
        partial(_stalled_readers, count=readers),
        _trickling_reader,
        _stalled_reader_of_a_whole_answer,
        _crumbs,
        _body_that_never_comes,
        _body_that_drips,
        _chunks_that_never_come,
        _continue_and_silence,
        _continue_then_the_body,
        _head_that_drips,
        _head_after_an_answer_drips,
        _idle_connection,
        _never_used,
        _empty_lines_for_ever,
        _a_thousand_requests,
        _refused_uploads,
        _slow_reader_in_the_end,
    ]
    async with trio.open_nursery() as nursery:
        for case in cases:
            nursery.start_soon(case, siege)
    siege.report.count("cases", len(cases))


def _answers(peer: Peer) -> list[Response]:
    try:
        return [r for r in split_responses(bytes(peer.data)) if r.status >= 200]
    except ValueError:
        return []


def _expect(siege: Siege, case: str, good: bool, why: str, peer: Peer | None = None) -> None:
    if not good:
        siege.report.found(case, why, received=bytes(peer.data[:2000]) if peer else b"")


async def _ends_within(peer: Peer, seconds: float) -> float:
    """How long it took the server to close; infinite when it did not."""
    began = trio.current_time()
    with trio.move_on_after(seconds):
        await peer.receive_to_the_end()
        return trio.current_time() - began
    return math.inf


async def _expect_cut(
    siege: Siege, case: str, peer: Peer, clock: str, statuses: list[int], late: float = 0.0
) -> None:
    """Closed when *clock* ran out, with the answers *statuses* in all."""
    due = CLOCKS[clock]
    took = await _ends_within(peer, due + 2.5 + _SLACK)
    _expect(siege, case, took < math.inf, f"not cut {due} s later, by {clock}", peer)
    if took < math.inf:
        early = took < due - late - 0.3
        _expect(siege, case, not early, f"cut after {took:.2f} s, {clock} is {due}", peer)
        got = [r.status for r in _answers(peer)]
        _expect(siege, case, got == statuses, f"answered {got}, not {statuses}", peer)
        _expect(siege, case, peer.ended == "fin", f"ended by {peer.ended}", peer)


async def _stalled_readers(siege: Siege, *, count: int) -> None:
    """They ask for long streams and read nothing: hung up on, and the engine let go."""
    lane = siege.lanes[0]
    plan = json.dumps({"events": 1500, "size": 8000, "hang": 1})
    data = bytes(post(chat_body(lane.model, plan, stream=True)))
    peers = [await Peer.connect(siege.port, receive_buffer=4096) for _ in range(count)]
    try:
        for peer in peers:
            await peer.send(data)
        with trio.move_on_after(5):
            await lane.engine.wait_until(lambda: lane.engine.in_flight >= count)
        began = trio.current_time()
        with trio.move_on_after(CLOCKS["write_timeout"] * 2 + 3 + _SLACK) as patience:
            await lane.engine.wait_until(lambda: not lane.engine.in_flight)
        took = trio.current_time() - began
        _expect(
            siege, "stalled readers", not patience.cancelled_caught,
            f"the engine still works for {lane.engine.in_flight} readers that stopped {took:.1f} s "
            f"ago; write_timeout is {CLOCKS['write_timeout']} s",
        )  # fmt: skip
        siege.report.count("stalled readers", count)
    finally:
        for peer in peers:
            peer.reset()


async def _stalled_reader_of_a_whole_answer(siege: Siege) -> None:
    """It never gets all of it, since it was hung up on long before it began to read."""
    lane = siege.lanes[5]
    size = 12_000_000
    body = chat_body(lane.model, json.dumps({"size": size}))
    async with await Peer.connect(siege.port, receive_buffer=4096) as peer:
        await peer.send(bytes(post(body)))
        await trio.sleep(CLOCKS["write_timeout"] + 1.2)
        with trio.move_on_after(10):
            await peer.receive_to_the_end()
        got = len(peer.data)
        _expect(
            siege, "a whole answer, unread", got < size, "it was kept for a reader that stopped"
        )


_CRUMBS = 100_000


async def _crumbs(siege: Siege) -> None:
    """A body in chunks of one byte: a lot of work for little. The others must not feel it."""
    lane = siege.lanes[6]
    body = chat_body(lane.model, "crumbs")
    body += b" " * (_CRUMBS - len(body))
    async with await Peer.connect(siege.port) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(peer.send, bytes(chunked(body, chunks(body, 1))))
        with trio.move_on_after(15):
            while await peer.receive():
                if (found := _answers(peer)) and found[0].complete:
                    break
        nursery.cancel_scope.cancel(reason="it is answered")
    got = [r.status for r in _answers(peer)]
    _expect(siege, "chunks of one byte", got in ([200], [413]), f"answered {got}", peer)


async def _trickling_reader(siege: Siege) -> None:
    """It reads, so that its kernel goes on acknowledging, but far too slowly."""
    lane = siege.lanes[4]
    plan = json.dumps({"events": 1500, "size": 8000, "hang": 1})
    allowed = CLOCKS["write_timeout"] * 3 + 2 + _SLACK
    async with await Peer.connect(siege.port, receive_buffer=16384) as peer:
        await peer.send(bytes(post(chat_body(lane.model, plan, stream=True))))
        with trio.move_on_after(5):
            await lane.engine.wait_until(lambda: lane.engine.in_flight == 1)
        with trio.move_on_after(allowed) as patience:
            while lane.engine.in_flight:
                await peer.receive(2000)
                await trio.sleep(0.1)
        why = f"still served after {allowed} s, though 64 KiB are due every write_timeout"
        _expect(siege, "a reader that trickles", not patience.cancelled_caught, why)


async def _slow_reader_in_the_end(siege: Siege) -> None:
    """Slow, but not stalled: it gets all of it, whole."""
    lane = siege.lanes[1]
    plan = json.dumps({"events": 60, "size": 4000})
    async with await Peer.connect(siege.port, receive_buffer=16384) as peer:
        await peer.send(bytes(post(chat_body(lane.model, plan, stream=True))))
        with trio.move_on_after(20):
            while await peer.receive(16384):
                if peer.data.endswith(b"\r\n0\r\n\r\n"):
                    break
                await trio.sleep(0.04)
        good = bytes(peer.data).endswith(b"\r\n0\r\n\r\n") and b"data: [DONE]" in peer.data
        _expect(siege, "a slow reader", good, f"got {len(peer.data)} bytes, {peer.ended}")


async def _body_that_never_comes(siege: Siege) -> None:
    async with await Peer.connect(siege.port) as peer:
        raw = post(b" " * 100)
        await peer.send(bytes(raw)[: -len(raw.body)])
        await _expect_cut(siege, "Content-Length: 100 and silence", peer, "body_timeout", [408])


async def _body_that_drips(siege: Siege) -> None:
    async with await Peer.connect(siege.port) as peer, trio.open_nursery() as nursery:
        raw = post(b" " * 100)
        await peer.send(bytes(raw)[: -len(raw.body)])
        nursery.start_soon(_drip, peer, raw.body, 0.1)
        await _expect_cut(siege, "a body that drips", peer, "body_timeout", [408])
        nursery.cancel_scope.cancel(reason="it has been cut")


async def _chunks_that_never_come(siege: Siege) -> None:
    async def play(encoded: bytes) -> None:
        async with await Peer.connect(siege.port) as peer:
            await peer.send(bytes(chunked(b"", encoded)))
            name = f"chunks {encoded!r} and silence"
            await _expect_cut(siege, name, peer, "body_timeout", [408])

    async with trio.open_nursery() as nursery:
        for encoded in (b"5\r\nhel", b"5", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n"):
            nursery.start_soon(play, encoded)


async def _continue_and_silence(siege: Siege) -> None:
    async with await Peer.connect(siege.port) as peer:
        raw = post(b" " * 100).plus(b"Expect: 100-continue")
        await peer.send(bytes(raw)[: -len(raw.body)])
        await _expect_cut(siege, "100-continue and silence", peer, "body_timeout", [408])
        asked = peer.data.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        _expect(siege, "100-continue and silence", asked, "not asked for the body", peer)


async def _continue_then_the_body(siege: Siege) -> None:
    """The body comes when it is asked for, in two requests on one connection."""
    lane = siege.lanes[2]
    body = chat_body(lane.model, "continue")
    raw = post(body).plus(b"Expect: 100-continue")
    case = "100-continue, then the body"
    async with await Peer.connect(siege.port) as peer:
        for number in (1, 2):
            peer.data.clear()
            await peer.send(bytes(raw)[: -len(body)])
            with trio.move_on_after(1.5):
                while not peer.data.endswith(b"\r\n\r\n"):
                    await peer.receive()
            expected = b"HTTP/1.1 100 Continue\r\n\r\n"
            _expect(siege, case, bytes(peer.data) == expected, f"not asked, {number}", peer)
            await peer.send(body[:20])
            await trio.sleep(0.05)  # so that the rest is waited for again, and not asked for again
            await peer.send(body[20:])
            with trio.move_on_after(3):
                while not _answers(peer) or not _answers(peer)[-1].complete:
                    if not await peer.receive():
                        break
            got = [r.status for r in split_responses(bytes(peer.data))]
            _expect(siege, case, got == [100, 200], f"answered {got}, {number}", peer)


async def _drip(peer: Peer, data: bytes, gap: float) -> None:
    for byte in data:
        if not await peer.send(bytes([byte])):
            return
        await trio.sleep(gap)


async def _head_that_drips(siege: Siege) -> None:
    async with await Peer.connect(siege.port) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(_drip, peer, bytes(post(b"{}").plus(b"X: " + b"y" * 100)), 0.1)
        await _expect_cut(siege, "a head that drips", peer, "header_timeout", [408])
        nursery.cancel_scope.cancel(reason="it has been cut")


async def _head_after_an_answer_drips(siege: Siege) -> None:
    """The second request's head has the same clock, from its first byte."""
    async with await Peer.connect(siege.port) as peer, trio.open_nursery() as nursery:
        await peer.send(bytes(get()))
        await peer.receive()
        nursery.start_soon(_drip, peer, bytes(get().plus(b"X: " + b"y" * 100)), 0.1)
        await _expect_cut(siege, "a second head that drips", peer, "header_timeout", [200, 408])
        nursery.cancel_scope.cancel(reason="it has been cut")


async def _idle_connection(siege: Siege) -> None:
    async with await Peer.connect(siege.port) as peer:
        await peer.send(bytes(get()))
        await peer.receive()
        await _expect_cut(siege, "an idle connection", peer, "keep_alive_timeout", [200])


async def _never_used(siege: Siege) -> None:
    async with await Peer.connect(siege.port) as peer:
        await _expect_cut(siege, "a connection never used", peer, "header_timeout", [])


async def _empty_lines_for_ever(siege: Siege) -> None:
    """Lines that may stand before a request are no request, and put no clock back."""

    async def play(before: bytes, clock: str) -> None:
        case = f"empty lines for ever, after {before[:20]!r}"
        async with await Peer.connect(siege.port) as peer, trio.open_nursery() as nursery:
            await peer.send(before)
            nursery.start_soon(_drip, peer, b"\r\n" * 100, 0.05)
            took = await _ends_within(peer, CLOCKS[clock] + 2.5 + _SLACK)
            nursery.cancel_scope.cancel(reason="it has been cut")
            _expect(siege, case, took < math.inf, f"not cut by {clock}", peer)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, b"", "header_timeout")
        nursery.start_soon(play, bytes(get()), "keep_alive_timeout")


async def _a_thousand_requests(siege: Siege) -> None:
    """A connection carries a thousand; the last answer says so, and nothing is lost."""
    case = "1 001 requests on one connection"
    one = bytes(get(b"/livez"))
    async with await Peer.connect(siege.port) as peer:
        count, last, buffer = 0, False, bytearray()
        with trio.move_on_after(60):
            while not last and count < 1001:
                await peer.send(one)
                while not (found := split_responses(bytes(buffer))) or not found[0].complete:
                    if not (data := await peer.receive()):
                        break
                    buffer += data
                if not buffer:
                    break
                buffer.clear()
                count, last = count + 1, found[0].closes
        _expect(siege, case, (count, last) == (1000, True), f"{count} answers, last one: {last}")
        if last:
            await peer.send(one)
            took = await _ends_within(peer, 3)
            _expect(siege, case, took < math.inf, "not closed after the last one")


async def _refused_uploads(siege: Siege) -> None:
    """An upload is refused before it has come: the client can read why, and what was on its way
    is no request."""
    inner = bytes(post(chat_body(siege.lanes[3].model, "inner")))
    siege.lanes[3].forget()
    for name, raw in {
        "too large": post(b"").without(b"content-length").plus(b"Content-Length: 20000000"),
        "of another type": post(b"").without(b"content-length").without(b"content-type").plus(
            b"Content-Type: text/plain", b"Content-Length: 20000000"),
        "to nowhere": post(b"", b"/nowhere").without(b"content-length").plus(
            b"Content-Length: 5000000"),
        "by another method": post(b"").started(b"PUT %s HTTP/1.1" % CHAT).without(
            b"content-length").plus(b"Content-Length: 5000000"),
    }.items():  # fmt: skip
        async with await Peer.connect(siege.port) as peer, trio.open_nursery() as nursery:
            nursery.start_soon(_upload, peer, bytes(raw), inner)
            took = await _ends_within(peer, 6)
            nursery.cancel_scope.cancel(reason="it has been refused")
        got = _answers(peer)
        case = f"an upload {name}"
        _expect(siege, case, took < math.inf, "the connection was kept open", peer)
        good = len(got) == 1 and got[0].status >= 400 and got[0].complete and got[0].closes
        _expect(siege, case, good, f"answered {[r.status for r in got]}, {peer.ended}", peer)
    _expect(siege, "uploads", not siege.lanes[3].take(), "a body was executed as a request")


async def _upload(peer: Peer, head: bytes, piece: bytes) -> None:
    if await peer.send(head):
        for _ in range(2_000_000 // len(piece)):
            if not await peer.send(piece):
                return


async def play_stop(siege: Siege) -> None:
    """SIGTERM amid readers that stopped, streams that go on and engines that say nothing.

    There is nothing left to check the levels of afterwards.
    """
    gateway = siege.gateway
    await siege.healthy.rest()
    lane = siege.lanes[0]
    plans: list[tuple[dict[str, object], bytes, int | None]] = [
        ({"events": 1500, "size": 8000, "hang": 1}, b"", 4096),
        ({"events": 2000, "gap": 0.01}, b"", None),
        ({"events": 2, "hang": 1}, bytes(get()), None),
    ]
    peers: list[Peer] = []
    for plan, behind, room in plans:
        for _ in range(4):
            peer = await Peer.connect(siege.port, receive_buffer=room)
            peers.append(peer)
            body = chat_body(lane.model, json.dumps(plan), stream=True)
            await peer.send(bytes(post(body)) + behind)
    for data in (b"", b"POST /v1", bytes(post(b" " * 100))[:-50], bytes(get())):
        peer = await Peer.connect(siege.port)
        peers.append(peer)
        await peer.send(data)
    with trio.move_on_after(3):
        await lane.engine.wait_until(lambda: lane.engine.in_flight >= 12)
    await trio.sleep(0.3)
    began = trio.current_time()
    gateway.terminate()
    allowed = CLOCKS["lame_duck"] + CLOCKS["drain_timeout"] + 2
    with trio.move_on_after(allowed + 5):
        await gateway.process.wait()
    took = trio.current_time() - began
    code = gateway.process.returncode
    for peer in peers:
        peer.close()
    if code != 0 or took > allowed + 0.5:
        siege.report.found("SIGTERM", f"exit code {code} after {took:.2f} s, allowed {allowed}")
    with trio.move_on_after(2) as patience:
        await lane.engine.wait_until(lambda: not lane.engine.in_flight)
    if patience.cancelled_caught:
        siege.report.found("SIGTERM", f"the engine still works on {lane.engine.in_flight}")
    for complaint in gateway.complaints:
        siege.report.found("log", complaint)
    siege.report.note(f"stop: exit code {code} after {took:.2f} s, {allowed} s were allowed")
