"""An upstream's responses from bytes: where they end, and what may follow them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.http1_response import (
    MAX_HEAD,
    MAX_INFORMATIONAL,
    BadResponse,
    CutShort,
    ResponseParser,
    encode_request,
    encode_response_head,
)

steady = settings(deadline=None, derandomize=True)

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: u\r\n\r\n"


def feed(*pieces: bytes, bodiless: bool = False) -> ResponseParser:
    parser = ResponseParser()
    parser.begin(bodiless=bodiless)
    for piece in pieces:
        parser.feed(piece)
    return parser


def test_a_response_appears_with_its_head_and_its_body_follows() -> None:
    parser = feed(b"HTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: 5\r\n")
    assert (parser.started, parser.head_complete) == (True, False)

    parser.feed(b"\r\nhe")
    assert (parser.head_complete, parser.complete, parser.status) == (True, False, 200)
    assert parser.headers == [(b"x-a", b"b"), (b"content-length", b"5")]
    assert parser.take_body() == b"he"

    parser.feed(b"l")
    parser.feed(b"lo")
    assert (parser.take_body(), parser.take_body()) == (b"llo", b"")
    assert (parser.complete, parser.reusable, parser.surplus) == (True, True, False)


@pytest.mark.parametrize("data", [HELLO, CHUNKS], ids=["length", "chunks"])
def test_cuts_between_bytes_do_not_matter(data: bytes) -> None:
    for cut in range(len(data)):
        parser = feed(*(piece for piece in (data[:cut], data[cut:]) if piece))
        assert (parser.take_body(), parser.complete, parser.reusable) == (b"hello", True, True)


@pytest.mark.parametrize(
    ("data", "bodiless", "reusable"),
    [
        (HELLO, False, True),
        (CHUNKS, False, True),
        (OK + b"Content-Length: 0\r\n\r\n", False, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", False, True),
        (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", False, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False, False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", False, True),
        (OK + b"Content-Length: 5\r\n\r\n", True, False),
    ],
    ids=["length", "chunks", "empty", "204", "304", "close", "1.0", "1.0 keep-alive", "HEAD"],
)
def test_a_whole_response_leaves_the_connection_as_it_said(
    data: bytes, bodiless: bool, reusable: bool
) -> None:
    parser = feed(data, bodiless=bodiless)

    assert (parser.complete, parser.reusable, parser.surplus) == (True, reusable, False)


@pytest.mark.parametrize(
    "start",
    [HELLO, CHUNKS, b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n"],
    ids=["length", "chunks", "204", "304"],
)
@pytest.mark.parametrize("more", [HELLO, b"x", b"\x00\x01", b"HTTP/1.1 500 X\r\n\r\n"], ids=repr)
def test_bytes_behind_a_response_are_noticed_and_not_read(start: bytes, more: bytes) -> None:
    together, apart = feed(start + more), feed(start, more)

    for parser in (together, apart):
        assert (parser.complete, parser.surplus) == (True, True)
        assert parser.status != 500
        assert parser.take_body() in {b"hello", b""}


def test_a_body_without_framing_ends_with_the_connection() -> None:
    parser = feed(OK + b"\r\nhel", b"lo")
    assert not parser.complete

    parser.feed_eof()
    assert (parser.complete, parser.reusable, parser.take_body()) == (True, False, b"hello")


@pytest.mark.parametrize(
    ("data", "started", "where"),
    [
        (b"", False, "without an answer"),
        (b"HTT", True, "its head"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", True, "its head"),
        (HELLO[:-1], True, "its body"),
        (CHUNKS[:-2], True, "its body"),
    ],
    ids=["nothing", "word", "only 100", "length", "chunks"],
)
def test_a_connection_closed_too_soon_is_told_with_where(
    data: bytes, started: bool, where: str
) -> None:
    parser = feed(*([data] if data else []))

    with pytest.raises(CutShort, match=where) as caught:
        parser.feed_eof()
    assert caught.value.started is started


def test_informational_responses_are_swallowed() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"

    parser = feed(b"HTTP/1.1 100 Continue\r\n\r\n" + early + HELLO)

    assert (parser.status, parser.headers) == (200, [(b"content-length", b"5")])
    assert parser.take_body() == b"hello"


def test_eight_informational_responses_are_enough() -> None:
    one = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert feed(one * MAX_INFORMATIONAL + HELLO).status == 200

    with pytest.raises(BadResponse, match="too many 1xx"):
        feed(one * (MAX_INFORMATIONAL + 1))


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 600 X\r\n\r\n",
        b"HTTP/1.1 999 X\r\n\r\n",
        b"HTTP/1.1 099 X\r\n\r\n",
        b"HTTP/1.1 20 X\r\n\r\n",
        b"HTTP/1.1 abc X\r\n\r\n",
        b"HTTP/3.1 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        OK + b"Content-Length: x\r\n\r\n",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        OK + b"X: a\x00b\r\n\r\n",
    ],
    ids=repr,
)
def test_broken_protocol_is_refused(data: bytes) -> None:
    with pytest.raises(BadResponse):
        feed(data)


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 ",
        OK + b"X: ",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nX: ",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2;",
    ],
    ids=["reason", "header", "trailer", "chunk extension"],
)
def test_what_never_ends_is_refused_at_64_kib(start: bytes) -> None:
    with pytest.raises(BadResponse, match="larger than 65536 bytes"):
        feed(start, *[b"a" * 4096] * 20)


def test_many_small_headers_are_limited_together() -> None:
    field = b"X-Header: value\r\n"

    with pytest.raises(BadResponse, match="head is larger"):
        feed(OK + field * (MAX_HEAD // len(field) + 1) + b"\r\n")


def test_a_large_body_has_no_limit_here() -> None:
    size = 10 * MAX_HEAD
    parser = feed(OK + b"Content-Length: %d\r\n\r\n" % size, *[b"a" * MAX_HEAD] * 10)

    assert (parser.complete, len(parser.take_body())) == (True, size)


@steady
@given(st.binary(max_size=200), st.sampled_from([b"", OK, OK + b"\r\n", CHUNKS[:50], HELLO]))
def test_no_bytes_raise_anything_but_bad_response(noise: bytes, start: bytes) -> None:
    with suppress(BadResponse):
        feed(start + noise).feed_eof()


@pytest.mark.parametrize(
    ("status", "line"),
    [(200, b"HTTP/1.1 200 OK"), (429, b"HTTP/1.1 429 Too Many Requests"), (299, b"HTTP/1.1 299 ")],
)
def test_our_heads_are_written_with_their_phrase(status: int, line: bytes) -> None:
    head = encode_response_head(status, [(b"a", b"b"), (b"c", b"d")])

    assert head == line + b"\r\na: b\r\nc: d\r\n\r\n"


def test_a_request_is_written_whole() -> None:
    request = encode_request(b"POST", b"/v1", [(b"host", b"a"), (b"content-length", b"2")], b"{}")

    assert request == b"POST /v1 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}"
