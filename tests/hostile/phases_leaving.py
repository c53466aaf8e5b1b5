"""Clients that leave: at every byte of a request and of an answer, politely and rudely."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Literal

import attrs
import trio

from tests.hostile.engines import Lane
from tests.hostile.siege import Siege
from tests.hostile.wire import Peer, chat_body, chunked, chunks, get, post

How = Literal["reset", "close", "half"]
HOWS: tuple[How, ...] = ("reset", "close", "half")
FREED_WITHIN = 1.0
_ANSWERED_WITHIN = 3.0


def leave(peer: Peer, how: How) -> None:
    match how:
        case "reset":
            peer.reset()
        case "close":
            peer.close()
        case "half":
            peer.half_close()


@attrs.frozen
class _Departure:
    """Leave after *at* bytes: of the request, or, with `answering`, of the answer to it."""

    data: bytes
    at: int
    how: How
    name: str
    mark: str
    answering: bool = False


def _requests(model: str, mark: str) -> dict[str, bytes]:
    body = chat_body(model, mark)
    return {
        "a length": bytes(post(body)),
        "chunks": bytes(chunked(body, chunks(body, 30, b";a=b", (b"X: y",)))),
        "two in a row": bytes(post(body)) + bytes(get()),
    }


def _answered(model: str, mark: str) -> dict[str, bytes]:
    events = json.dumps({"events": 4, "gap": 0.001})
    return {
        "whole": bytes(post(chat_body(model, mark))),
        "stream": bytes(post(chat_body(model, events, stream=True))),
        "refusal": b"GARBAGE\r\n\r\n",
        "listing": bytes(get()),
    }


def _mark(number: int) -> str:
    """Always of the same length, since departures are counted in bytes."""
    return f"leaves-{number:06d}"


_Job = tuple[Callable[[str, str], dict[str, bytes]], str, int, How, bool]


async def play_departures(siege: Siege, *, every: int = 1) -> None:
    """At every byte of a request, and of an answer."""
    jobs: list[_Job] = []
    numbers = itertools.count(1)
    sizes = {"whole": 620, "stream": 1500, "refusal": 320, "listing": 900}
    for make, answering in ((_requests, False), (_answered, True)):
        for name, data in make(siege.lanes[0].model, _mark(0)).items():
            size = sizes[name] if answering else len(data) + 1
            for i, how in enumerate(HOWS):
                start = siege.rng("departure", name, how).randrange(every) + i
                jobs += [(make, name, at, how, answering) for at in range(start, size, every)]

    async def play(siege: Siege, lane: Lane, job: _Job) -> None:
        make, name, at, how, answering = job
        mark = _mark(next(numbers))
        await _depart(
            siege, lane, _Departure(make(lane.model, mark)[name], at, how, name, mark, answering)
        )

    await siege.each(jobs, play)


async def _depart(siege: Siege, lane: Lane, departure: _Departure) -> None:
    siege.report.count("departures")
    lane.forget()
    case = f"{departure.name}, {departure.how} after {departure.at} bytes"
    data, at = departure.data, departure.at
    async with await Peer.connect(siege.port) as peer:
        if departure.answering:
            await peer.send(data)
            with trio.move_on_after(_ANSWERED_WITHIN) as patience:
                while len(peer.data) < at and await peer.receive(at - len(peer.data)):
                    if peer.data.endswith(b"0\r\n\r\n"):
                        break
                    if b"\r\ncontent-length: " in peer.data and peer.data.endswith(b"}"):
                        break  # that was all of it
            if patience.cancelled_caught and not peer.data:
                siege.report.found(case, "no answer at all", data)
        else:
            await peer.send(data[:at])
        leave(peer, departure.how)
        if departure.how == "half":
            with trio.move_on_after(_ANSWERED_WITHIN) as patience:
                await peer.receive_to_the_end()
            if patience.cancelled_caught:
                siege.report.found(case, "half-closed, and kept open", data, bytes(peer.data))
    await _expect_freed(siege, lane, case)
    if not departure.answering and at < len(data) and departure.name != "two in a row":
        for body in lane.take():  # those of clients that left a moment before may be among them
            if departure.mark.encode() in body:
                siege.report.found(case, f"half a request was forwarded: {body!r}", data[:at])


async def _expect_freed(siege: Siege, lane: Lane, case: str) -> None:
    """The engine must know that nobody waits any more."""
    with trio.move_on_after(FREED_WITHIN) as patience:
        await lane.engine.wait_until(lambda: not lane.engine.in_flight)
    if patience.cancelled_caught:
        siege.report.found(case, f"the engine still works for nobody after {FREED_WITHIN} s")


async def play_silent_engines(siege: Siege, *, rounds: int) -> None:
    """Leave while the engine says nothing, with and without bytes pipelined behind."""
    plan = json.dumps({"hang": 1, "events": 2})
    behind = {
        "nothing": b"",
        "half a request": bytes(get())[:-5],
        "a request": bytes(get()),
        "twenty requests": bytes(get()) * 20,
        "garbage": b"\x00" * 50,
        "an upload": bytes(post(b" " * 300_000)),
    }
    jobs = [
        (name, stream, how, round_)
        for name in behind
        for stream in (False, True)
        for how in HOWS
        for round_ in range(rounds)
    ]

    async def play(siege: Siege, lane: Lane, job: tuple[str, bool, How, int]) -> None:
        name, stream, how, _ = job
        fields = {"stream": True} if stream else {}
        data = bytes(post(chat_body(lane.model, plan, **fields)))
        case = f"{'stream' if stream else 'whole'}, {name} behind it, {how}"
        siege.report.count("departures")
        lane.forget()
        async with await Peer.connect(siege.port) as peer:
            await peer.send(data)
            with trio.move_on_after(_ANSWERED_WITHIN):
                await lane.engine.wait_until(lambda: lane.engine.in_flight == 1)
                if stream:
                    await peer.receive()
            if lane.engine.in_flight != 1:
                siege.report.found(case, "the request did not reach the engine", data)
                return
            with trio.move_on_after(0.1):
                await peer.send(behind[name])
            await trio.sleep(0.005)
            leave(peer, how)
            await _expect_freed(siege, lane, case)
            if len(lane.take()) > 1:
                siege.report.found(case, "what was pipelined was executed for nobody", data)

    await siege.each(jobs, play)


async def play_crowds(siege: Siege, *, rounds: int, size: int = 40) -> None:
    """Many streams whose clients all leave in one moment."""
    plan = json.dumps({"events": 500, "gap": 0.01, "size": 200})
    lane = siege.lanes[0]
    data = bytes(post(chat_body(lane.model, plan, stream=True))) + bytes(get())
    for number in range(rounds):
        peers = [await Peer.connect(siege.port) for _ in range(size)]
        try:
            for peer in peers:
                await peer.send(data)
            for peer in peers:
                with trio.move_on_after(_ANSWERED_WITHIN):
                    await peer.receive()
            for peer in peers:
                leave(peer, HOWS[number % 3])
            await _expect_freed(siege, lane, f"{size} streams, {HOWS[number % 3]}")
            siege.report.count("departures", size)
        finally:
            for peer in peers:
                peer.close()
