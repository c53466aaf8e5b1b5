"""How one answer goes: what is said, with which pauses, and how it ends."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator

import attrs

from tests.sim import speech
from tests.sim.draw import JobFault
from tests.sim.speech import Answer, Event, Said


class End(enum.Enum):
    """How a job ended, as its engine saw it."""

    ANSWERED = "answered"
    REFUSED = "refused"
    CUT = "cut"
    RESET = "reset"
    LEFT = "the gateway left"
    KILLED = "killed"


@attrs.frozen
class Say:
    """Bytes to send, and the events that are complete with them.

    :param end: with these bytes the job is over.
    """

    data: bytes
    events: tuple[Event, ...] = ()
    end: End | None = None


@attrs.frozen
class Pause:
    seconds: float


@attrs.frozen
class Hang:
    """Say nothing more."""


@attrs.frozen
class Part:
    """Hang up, and what that makes of the job, if it is not over."""

    end: End
    reset: bool = False


Step = Say | Pause | Hang | Part

REFUSALS: tuple[tuple[int, str | None], ...] = (
    (400, None), (401, None), (404, None), (422, None), (429, None), (429, "1"), (429, "0.3"),
    (429, "-1"), (500, None), (502, None), (503, None), (503, "2"), (503, "soon"), (503, "0.7"),
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Order:
    """What is to be answered."""

    path: str
    job: str
    request_id: str
    stream: bool
    usage: bool
    answer: Answer
    counts: bool
    packs: bool


@attrs.frozen(kw_only=True)
class Script:
    """The steps of an answer, and what is known of it from the start.

    :param body: the whole answer to a request without a stream, when it is a good one.
    :param status: with which it refuses, and the Retry-After with it.
    """

    steps: tuple[Step, ...]
    body: bytes | None = None
    status: int = 200
    retry_after: str | None = None


def script(
    order: Order, fault: JobFault | None, think: float, gap: float, rng: random.Random
) -> Script:
    """*fault* goes wrong with it, if it can."""
    thinking: tuple[Step, ...] = (Pause(think),) if think else ()
    match fault:
        case JobFault.REFUSES:
            return _refusal(thinking, rng)
        case JobFault.TOO_LONG:
            error = b'{"error": {"message": "too long", "type": "exceed_context_size_error"}}'
            said = Say(_sized(400, error), end=End.REFUSED)
            return Script(steps=(*thinking, said), status=400)
        case JobFault.HANGS:
            return Script(steps=(Hang(),))
        case JobFault.CUTS if rng.random() < 0.3:
            return Script(steps=(*thinking, Part(End.CUT)))
        case JobFault.RESETS if rng.random() < 0.3:
            return Script(steps=(*thinking, Part(End.RESET, reset=True)))
        case JobFault.GARBAGE:
            garbage = b"\x00\xff this is no HTTP\r\n\r\n"
            return Script(steps=(*thinking, Say(garbage, end=End.CUT), Part(End.CUT)))
        case JobFault.HTML:
            page = b"<html><body>It works!</body></html>"
            return Script(steps=(*thinking, Say(_sized(200, page, b"text/html"), end=End.REFUSED)))
        case JobFault.EMPTY:
            return Script(steps=(*thinking, Say(_sized(200, b""), end=End.REFUSED)))
        case JobFault.ERROR_IN_200:
            error = b'{"error": {"message": "no room", "type": "server_error", "code": 503}}'
            return Script(steps=(*thinking, Say(_sized(200, error), end=End.REFUSED)))
    if order.stream:
        return Script(steps=(*thinking, *_stream(order, fault, gap, rng)))
    return _whole(order, fault, thinking, gap, rng)


def refuses_usage() -> Script:
    """What engines say that do not know ``stream_options``."""
    body = b'{"error": {"message": "stream_options: extra fields not permitted"}}'
    return Script(steps=(Say(_sized(400, body), end=End.REFUSED),), status=400)


def refuses_to_go_on(rng: random.Random) -> Script:
    """What engines say that do not let anybody begin their messages."""
    status = rng.choice([400, 404, 422, 501])
    body = b'{"error": {"message": "the last message must be from the user"}}'
    return Script(steps=(Say(_sized(status, body), end=End.REFUSED),), status=status)


def _refusal(thinking: tuple[Step, ...], rng: random.Random) -> Script:
    status, wait = rng.choice(REFUSALS)
    body = b'{"error": {"message": "not now", "type": "server_error", "code": "not_now"}}'
    extra = b"" if wait is None else b"retry-after: %s\r\n" % wait.encode()
    said = Say(_sized(status, body, extra=extra), end=End.REFUSED)
    return Script(steps=(*thinking, said), status=status, retry_after=wait)


def _whole(
    order: Order, fault: JobFault | None, thinking: tuple[Step, ...], gap: float, rng: random.Random
) -> Script:
    body = speech.whole_answer(order.path, order.job, order.request_id, order.answer)
    data = _sized(200, body)
    head_end = data.index(b"\r\n\r\n") + 4
    cut = rng.randrange(head_end, len(data)) if rng.random() < 0.7 else rng.randrange(1, head_end)
    steps: tuple[Step, ...]
    match fault:
        case JobFault.CUTS:
            steps = (Say(data[:cut]), Part(End.CUT))
        case JobFault.RESETS:
            steps = (Say(data[:cut]), Part(End.RESET, reset=True))
        case JobFault.STALLS:
            steps = (Say(data[:cut]), Hang())
        case JobFault.TRICKLES:
            step = max(1, len(data) // 7)
            pieces = [data[at : at + step] for at in range(0, len(data), step)]
            steps = tuple(_trickle(pieces, gap))
        case JobFault.TOO_SHORT:
            longer = _sized(200, body, length=len(body) + 9)
            steps = (Say(longer), Part(End.CUT))
        case JobFault.SURPLUS:
            steps = (Say(data + _sized(200, b'{"choices": []}'), end=End.ANSWERED),)
        case JobFault.INTERIM:
            interim = b"HTTP/1.1 103 Early Hints\r\n\r\n" * rng.choice([1, 3])
            steps = (Say(interim), Say(data, end=End.ANSWERED))
        case JobFault.CLOSES:
            steps = (Say(data, end=End.ANSWERED), Pause(gap), Part(End.ANSWERED))
        case JobFault.UNTIL_CLOSE:
            open_end = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + body
            steps = (Say(open_end, end=End.ANSWERED), Part(End.ANSWERED))
        case _:
            steps = (Say(data, end=End.ANSWERED),)
    whole = any(isinstance(step, Say) and step.end is End.ANSWERED for step in steps)
    return Script(steps=(*thinking, *steps), body=body if whole else None)


def _trickle(pieces: list[bytes], gap: float) -> Iterator[Step]:
    for number, piece in enumerate(pieces):
        if number:
            yield Pause(min(gap, 0.1))
        yield Say(piece, end=End.ANSWERED if number == len(pieces) - 1 else None)


def _stream(
    order: Order, fault: JobFault | None, gap: float, rng: random.Random
) -> tuple[Step, ...]:
    events = speech.stream_events(
        order.path,
        order.job,
        order.answer,
        rng,
        usage=order.usage,
        counts=order.counts,
        packs=order.packs,
    )
    at = rng.randrange(len(events))
    chunked, end, behind = True, End.ANSWERED, list[Step]()
    match fault:
        case JobFault.CUTS | JobFault.TOO_SHORT:
            events, end = events[:at], End.CUT
            torn = b'40\r\ndata: {"id": "torn'
            behind = [*([Say(torn)] if rng.random() < 0.5 else []), Part(End.CUT)]
        case JobFault.RESETS:
            events, end, behind = events[:at], End.RESET, [Part(End.RESET, reset=True)]
        case JobFault.STALLS:
            events, behind = events[:at], [Hang()]
        case JobFault.MALFORMED:
            events[at:at] = [speech.malformed(rng) for _ in range(rng.choice([1, 2, 5, 6, 8]))]
        case JobFault.NO_DONE:
            events = events[:-1]
        case JobFault.NO_FINISH:
            events = [event for event in events if event.said is not Said.FINISH]
        case JobFault.ERROR_EVENT:
            events = [*events[:at], speech.error_event()]
        case JobFault.ONLY_ROLES:
            events[:0] = [speech.quiet_event(order.job) for _ in range(rng.choice([5, 70]))]
        case JobFault.LINGERS:
            behind = [Hang()]
        case JobFault.UNTIL_CLOSE:
            chunked, behind = False, [Part(End.ANSWERED)]
        case JobFault.NO_BLANK_LINE:
            events = events[:-1]  # without [DONE]
            chunked, behind = False, [Part(End.ANSWERED)]
        case JobFault.CLOSES:
            behind = [Pause(gap), Part(End.ANSWERED)]
    steps: list[Step] = [Say(_stream_head(chunked))]
    if rng.random() < 0.3:
        steps.append(Pause(gap))
    steps += _events(events, gap, rng, chunked=chunked, trickles=fault is JobFault.TRICKLES)
    if fault is JobFault.NO_BLANK_LINE and isinstance(last := steps[-1], Say):
        steps[-1] = attrs.evolve(last, data=last.data[:-2])
    if (end is End.ANSWERED and behind != [Hang()]) or fault is JobFault.LINGERS:
        _end_with_last_event(steps)
    if chunked and (not behind or fault is JobFault.CLOSES):
        steps.append(Say(b"0\r\n\r\n"))
    return (*steps, *behind)


def _end_with_last_event(steps: list[Step]) -> None:
    """The job is over with the last word: what follows is good manners, or bad ones."""
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        if isinstance(step, Say) and (step.events or place == 0):
            steps[place] = attrs.evolve(step, end=End.ANSWERED)
            return


def _events(
    events: list[Event], gap: float, rng: random.Random, *, chunked: bool, trickles: bool
) -> Iterator[Step]:
    """Mostly an event a chunk; sometimes several at once, or one in pieces."""
    together = not trickles and rng.random() < 0.25
    number = 0
    while number < len(events):
        size = rng.randint(1, 4) if together else 1
        batch = tuple(events[number : number + size])
        if number and gap:
            yield Pause(gap)
        number += size
        data = b"".join(event.data for event in batch)
        if trickles:
            yield from _in_pieces(data, batch, rng, chunked=chunked)
        else:
            yield Say(_chunk(data) if chunked else data, batch)


def _in_pieces(
    data: bytes, batch: tuple[Event, ...], rng: random.Random, *, chunked: bool
) -> Iterator[Step]:
    cut = rng.randrange(1, len(data))
    pieces = [data[:cut], data[cut:]]
    if chunked and rng.random() < 0.5:
        framed = [_chunk(piece) for piece in pieces]
    elif chunked:
        whole = _chunk(data)
        framed = [whole[:cut], whole[cut:]]
    else:
        framed = pieces
    yield Say(framed[0])
    yield Pause(rng.choice([0.0, 0.01]))
    yield Say(framed[1], batch)


def _stream_head(chunked: bool) -> bytes:
    framing = b"transfer-encoding: chunked\r\n" if chunked else b""
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + framing + b"\r\n"


def _sized(
    status: int,
    body: bytes,
    kind: bytes = b"application/json",
    extra: bytes = b"",
    length: int | None = None,
) -> bytes:
    size = len(body) if length is None else length
    head = b"HTTP/1.1 %d Said\r\ncontent-type: %s\r\n%scontent-length: %d\r\n\r\n"
    return head % (status, kind, extra, size) + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
