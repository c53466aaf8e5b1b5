"""What is sent is wrong: the corpus, mutants, smuggled encodings, and odd deliveries of them."""

from __future__ import annotations

import json

import attrs
import trio

from tests.hostile.conversation import converse
from tests.hostile.corpus import Case, closings, corpus
from tests.hostile.engines import Lane
from tests.hostile.judge import Outcome, is_stricter, judge
from tests.hostile.mutators import canary, mutant, smuggled_encodings
from tests.hostile.oracle import Reading, Request, read, read_strictly
from tests.hostile.responses import split_responses
from tests.hostile.siege import Siege
from tests.hostile.wire import CHAT, Peer, chat_body, chunked, chunks, get, post


async def play_corpus(siege: Siege, *, every: int = 1) -> None:
    cases = {lane.model: list(corpus(lane.model)) for lane in siege.lanes}
    count = len(cases[siege.lanes[0].model])

    async def play(siege: Siege, lane: Lane, number: int) -> None:
        await _play_case(siege, lane, cases[lane.model][number])

    await siege.each(range(siege.seed % every, count, every), play)


async def _play_case(siege: Siege, lane: Lane, case: Case) -> None:
    follow = canary(lane.model, "corpus")
    # How it ends, so that we know how long to listen; what it means is the case's to say.
    end = "refused" if case.closes else "clean"
    requests = () if case.closes else (Request(case.method, b"/", b""), Request(b"POST", CHAT, b""))
    expected = Reading(requests, "refused" if end == "refused" else "clean")
    outcome = await converse(siege.port, lane, [case.data + follow], expected)
    siege.report.count("cases")
    why = _check_case(case, outcome, follow) or _check_reading(case, outcome)
    if why:
        siege.report.found(case.name, why, case.data, outcome.received)


def _check_case(case: Case, outcome: Outcome, follow: bytes) -> str | None:
    try:
        responses = split_responses(outcome.received, [case.method])
    except ValueError as exc:
        return f"the answer cannot be read: {exc}"
    final = [r for r in responses if r.status >= 200]
    body = follow.partition(b"\r\n\r\n")[2]
    executed = body in outcome.forwarded
    if not final:
        if case.silent and outcome.ended != "open":
            return None
        return f"no answer; the connection is {outcome.ended}"
    first, *more = final
    if first.status not in case.statuses:
        return f"answered {first.status}, not {sorted(case.statuses)}"
    if first.status >= 400 and case.method != b"HEAD" and first.error is None:
        return "refused without saying why"
    if case.closes and (more or executed):
        return f"what came behind it was {'executed' if executed else 'answered'}"
    if case.closes and (not first.closes or outcome.ended != "fin"):
        return f"refused, and the connection is {outcome.ended}"
    if case.closes and outcome.forwarded:
        return f"refused and yet forwarded: {outcome.forwarded!r}"
    if not case.closes and not first.closes and not executed:
        return "the good request behind it was not executed"
    if case.is_accepted and first.closes:
        return "a good request cost the connection"
    return None


def _check_reading(case: Case, outcome: Outcome) -> str | None:
    """The oracle has an opinion, too, on what is accepted."""
    if not case.is_accepted:
        return None
    reading = read_strictly(case.data)
    if reading.end == "refused" or len(reading.requests) != 1:
        return f"the oracle and the corpus disagree: {reading}"
    return None


async def play_mutants(siege: Siege, *, cases: int, first: int = 0) -> None:
    async def play(siege: Siege, lane: Lane, number: int) -> None:
        data = mutant(siege.rng("mutant", number), lane.model, f"m{number}")
        await _play_differential(siege, lane, f"mutant {number}", data)

    await siege.each(range(first, first + cases), play)


async def play_closings(siege: Siege) -> None:
    cases = {lane.model: list(closings(lane.model)) for lane in siege.lanes}

    async def play(siege: Siege, lane: Lane, number: int) -> None:
        name, data = cases[lane.model][number]
        await _play_differential(siege, lane, name, data)

    await siege.each(range(len(cases[siege.lanes[0].model])), play)


async def play_encodings(siege: Siege, *, every: int = 1) -> None:
    cases = {lane.model: list(smuggled_encodings(lane.model)) for lane in siege.lanes}
    total = len(cases[siege.lanes[0].model])

    async def play(siege: Siege, lane: Lane, number: int) -> None:
        name, data = cases[lane.model][number]
        await _play_differential(siege, lane, name, data)

    await siege.each(range(siege.seed % every, total, every), play)


async def _play_differential(siege: Siege, lane: Lane, name: str, data: bytes) -> None:
    data += canary(lane.model, name.replace(" ", "-"))
    reading = read(data)
    outcome = await converse(siege.port, lane, [data], reading)
    # Whoever asks for no model, or for one that the mutation made up, is answered elsewhere.
    elsewhere = siege.stray.take()
    if elsewhere:
        siege.report.count("went to the default model")
        _judge_strays(siege, name, data, reading, elsewhere)
    report = siege.report
    report.count("cases")
    report.count(f"cases that are {reading.end}")
    if why := judge(reading, outcome):
        if siege.gateway.process.poll() is None:
            report.found(name, f"{why} (read: {_say(reading)})", data, outcome.received)
    elif is_stricter(reading, outcome):
        report.count("cases refused although they could be read")


def _judge_strays(
    siege: Siege, name: str, data: bytes, reading: Reading, elsewhere: list[bytes]
) -> None:
    """Lanes share the default model, so a body of another lane's is not held against this one."""
    marks = {r.body.rpartition(b'"user": ')[2] for r in reading.requests}
    for body in elsewhere:  # other than the name of the model, it must be one that was read
        mark = body.rpartition(b'"user": ')[2]
        if mark in data and mark not in marks:
            siege.report.found(name, f"forwarded what nobody asked: {body!r}", data)


def _say(reading: Reading) -> str:
    return f"{len(reading.requests)} requests, then {reading.end} {reading.why}".rstrip()


_PILED_UP_MB = 25
_PILES_UP_WITHIN = 1.0


@attrs.frozen
class _Sample:
    name: str
    data: bytes


def _samples(model: str) -> list[_Sample]:
    body = chat_body(model, "split")
    good = post(body)
    return [
        _Sample("a length", bytes(good)),
        _Sample("chunks", bytes(chunked(body, chunks(body, 30, b";a=b", (b"X: y",))))),
        _Sample("three in a row", bytes(good) + bytes(get()) + bytes(chunked(body))),
        _Sample("CL and TE", bytes(chunked(body).plus(b"Content-Length: 5")) + bytes(good)),
        _Sample("an error", bytes(good) + bytes(get(b"/no")) + b"X\r\n\r\n" + bytes(good)),
        _Sample("a bad chunk", bytes(chunked(body, b"5\r\nhelloX\r\n0\r\n\r\n")) + bytes(good)),
        _Sample("a bare LF", bytes(good.plus(b"X: a\nb")) + bytes(good)),
        _Sample("a fold", bytes(good.plus(b"X: a", b" b")) + bytes(good)),
        _Sample("h2c", bytes(chunked(body).plus(b"Upgrade: h2c", b"Connection: upgrade"))),
        _Sample("close", bytes(good.plus(b"Connection: close")) + bytes(good)),
    ]  # fmt: skip


async def play_deliveries(siege: Siege, *, every: int = 1) -> None:
    """The same bytes one at a time and in every two halves: nothing must depend on that."""
    count = len(_samples("any"))
    whole: dict[tuple[str, str], Outcome] = {}

    async def deliver(siege: Siege, lane: Lane, job: tuple[int, int | None]) -> None:
        number, cut = job
        sample = _samples(lane.model)[number]
        reading = read(sample.data)
        if (lane.model, sample.name) not in whole:
            outcome = await converse(siege.port, lane, [sample.data], reading)
            whole[lane.model, sample.name] = outcome
            if why := judge(reading, outcome):
                siege.report.found(sample.name, why, sample.data, outcome.received)
        if cut is None:
            pieces = [bytes([byte]) for byte in sample.data]
            gap = 0.0002
        else:
            pieces, gap = [sample.data[:cut], sample.data[cut:]], 0.004
        outcome = await converse(siege.port, lane, pieces, reading, gap=gap)
        siege.report.count("deliveries")
        how = "byte by byte" if cut is None else f"cut at {cut}"
        case = f"{sample.name}, {how}"
        if why := judge(reading, outcome):
            siege.report.found(case, why, sample.data, outcome.received)
        elif not outcome.is_like(expected := whole[lane.model, sample.name]):
            siege.report.found(case, f"in one piece: {expected}", sample.data, outcome.received)

    jobs: list[tuple[int, int | None]] = [(number, None) for number in range(count)]
    for number in range(count):
        size = len(_samples(siege.lanes[0].model)[number].data)
        start = 1 + siege.rng("cut", number).randrange(every)
        jobs += [(number, cut) for cut in range(start, size, every)]
    await siege.each(jobs, deliver)


async def play_pipelines(siege: Siege, *, most: int) -> None:
    """Many requests in one segment: each has its own answer, in order, or the connection ends."""

    async def play(siege: Siege, lane: Lane, job: tuple[str, int]) -> None:
        kind, count = job
        data = b"".join(_in_line(lane.model, kind, number) for number in range(count))
        reading = read_strictly(data)
        outcome = await converse(siege.port, lane, [data], reading)
        siege.report.count("requests in pipelines", count)
        if why := judge(reading, outcome):
            siege.report.found(
                f"{count} in a row, {kind}", why, data[:2000], outcome.received[-900:]
            )

    kinds = ("get", "post", "chunks", "stream", "mixed", "large")
    counts = [n for n in (2, 5, 16, 17, 18, 50, 300) if n <= most]
    await siege.each([(kind, n) for kind in kinds for n in counts], play)
    await _pipeline_without_end(siege)


async def _pipeline_without_end(siege: Siege) -> None:
    """Behind a request that takes its time: what comes is not kept for ever."""
    lane = siege.lanes[0]
    data = bytes(post(chat_body(lane.model, json.dumps({"hang": 1}))))
    before = siege.gateway.resident_mb()
    async with await Peer.connect(siege.port) as peer:
        await peer.send(data)
        with trio.move_on_after(3):
            await lane.engine.wait_until(lambda: lane.engine.in_flight == 1)
        block = bytes(get(b"/livez")) * 1000
        with trio.move_on_after(4):
            for _ in range(120):
                if not await peer.send(block):
                    break
        grown = 0
        with trio.move_on_after(_PILES_UP_WITHIN):
            while grown <= _PILED_UP_MB:
                await trio.sleep(0.1)
                grown = siege.gateway.resident_mb() - before
        siege.report.note(f"120 000 requests behind one: {grown} MB more")
        if grown > _PILED_UP_MB:
            siege.report.found("120 000 requests behind one", f"{grown} MB were kept", data)


def _in_line(model: str, kind: str, number: int) -> bytes:
    body = chat_body(model, f"in-line-{number}")
    match ("get", "post", "chunks", "stream")[number % 4] if kind == "mixed" else kind:
        case "get":
            return bytes(get(b"/livez"))
        case "post":
            return bytes(post(body))
        case "chunks":
            return bytes(chunked(body, chunks(body, 9)))
        case "stream":
            return bytes(post(chat_body(model, f"in-line-{number}", stream=True)))
        case _:
            return bytes(post(body + b" " * 20_000))
