"""The judge is judged: it takes what is good and finds what is wrong."""

from __future__ import annotations

import random

import pytest

from tests.hostile.corpus import corpus
from tests.hostile.engines import digest
from tests.hostile.judge import Outcome, judge
from tests.hostile.mutators import mutant
from tests.hostile.oracle import read, read_strictly
from tests.hostile.responses import split_responses
from tests.hostile.wire import Ended, chat_body, chunked, chunks, get, post

BODY = chat_body("lane-aaa", "one")
GOOD = bytes(post(BODY))


def answer(status: int = 200, body: bytes = b"", *, close: bool = False) -> bytes:
    body = body or b'{"x":"%s"}' % digest(BODY).encode()
    if status >= 400:
        body = b'{"error":{"code":"bad_http_request"}}'
    head = b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n" % (status, len(body))
    return head + b"connection: close\r\n" * close + b"\r\n" + body


def test_requests_are_read_one_after_the_other() -> None:
    data = (
        GOOD + bytes(chunked(BODY, chunks(BODY, 7, b";a=b", (b"X: y",)))) + b"\r\n" + bytes(get())
    )

    reading = read(data)

    assert [(r.method, r.body) for r in reading.requests] == [
        (b"POST", BODY), (b"POST", BODY), (b"GET", b""),
    ]  # fmt: skip
    assert reading.end == "clean"
    assert read(data[:-1]).end == "incomplete"


def test_after_a_close_nothing_is_read() -> None:
    reading = read(bytes(post(BODY).plus(b"Connection: x, Close")) + GOOD)

    assert (len(reading.requests), reading.end) == (1, "closed")


BY_POLICY = ("CL 00n", "method b'p", "method b'P", "chunks: an extension", "chunks: many", "WebS")
"""Well formed, and yet refused: what the gateway does not speak, or not that much of."""


def test_the_oracle_agrees_with_the_corpus() -> None:
    for case in corpus("lane-aaa"):
        reading = read_strictly(case.data)
        if case.is_accepted:
            assert (case.name, reading.end, len(reading.requests)) == (case.name, "clean", 1)
        elif case.closes and not case.name.startswith(BY_POLICY):
            assert (case.name, len(reading.requests)) == (case.name, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_makes_the_same_mutants(seed: int) -> None:
    made = [mutant(random.Random(f"{seed}:{i}"), "lane-aaa", "x") for i in range(100)]

    assert made == [mutant(random.Random(f"{seed}:{i}"), "lane-aaa", "x") for i in range(100)]
    assert len(set(made)) > 80


BAD = bytes(post(BODY).plus(b"Content-Length: 3")) + GOOD


@pytest.mark.parametrize(
    ("sent", "received", "ended", "forwarded"),
    [
        (GOOD, answer(), "open", (BODY,)),
        (GOOD * 2, answer() * 2, "open", (BODY, BODY)),
        (GOOD * 2, answer(close=True), "fin", (BODY,)),  # no obligation to serve pipelines
        (GOOD, answer(400, close=True), "fin", ()),  # stricter than need be
        (BAD, answer(400, close=True), "fin", ()),
        (GOOD + BAD, answer() + answer(400, close=True), "fin", (BODY,)),
        (GOOD[:-5], b"", "open", ()),
        (GOOD[:-5], answer(408, close=True), "fin", ()),
    ],
)
def test_what_is_right_is_not_held_against_it(
    sent: bytes, received: bytes, ended: Ended, forwarded: tuple[bytes, ...]
) -> None:
    assert judge(read(sent), Outcome(received, ended, forwarded)) is None


@pytest.mark.parametrize(
    ("sent", "received", "ended", "forwarded"),
    [
        (BAD, answer() * 2, "open", (BODY, BODY)),  # served
        (BAD, answer(400, close=True), "fin", (BODY,)),  # refused, and executed
        (BAD, answer(400, close=True) * 2, "fin", ()),  # two answers
        (BAD, answer(400), "fin", ()),  # does not say that it closes
        (BAD, answer(400, close=True), "open", ()),  # says it, and does not
        (BAD, answer(400, close=True), "rst", ()),
        (BAD, b"", "fin", ()),  # without a word
        (BAD, b"", "open", ()),  # nothing at all
        (GOOD, answer() * 2, "open", (BODY, BODY)),
        (GOOD, answer(), "open", (BODY, BODY)),
        (GOOD, answer(), "open", (BODY[:-1],)),
        (GOOD, answer(body=b"{}"), "open", (BODY,)),  # somebody else's
        (GOOD, b"", "fin", ()),
        (GOOD * 2, answer(), "open", (BODY,)),
        (GOOD * 2, answer() + b"HTTP/1.1 101 x\r\n\r\n" + answer(), "open", (BODY, BODY)),
        (GOOD[:-5], answer(), "open", (BODY,)),
        (GOOD, answer()[:-3], "fin", (BODY,)),
        (GOOD, b"junk" + answer(), "open", (BODY,)),
    ],
)
def test_what_is_wrong_is_found(
    sent: bytes, received: bytes, ended: Ended, forwarded: tuple[bytes, ...]
) -> None:
    assert judge(read(sent), Outcome(received, ended, forwarded)) is not None


def test_an_answer_framed_twice_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="framed 2 times"):
        split_responses(
            b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\nx"
        )
