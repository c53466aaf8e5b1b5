"""Requests from bytes: what is taken, what is refused, and that cuts do not matter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.http1_request import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_TARGET,
    RequestParser,
)
from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.incoming_request import IncomingRequest

steady = settings(deadline=None, derandomize=True)

CANARY = b"GET /canary HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def head(
    extra: bytes = b"", method: bytes = b"POST", target: bytes = b"/x", version: bytes = b"HTTP/1.1"
) -> bytes:
    return b"%s %s %s\r\nHost: a\r\n%s\r\n" % (method, target, version, extra)


def parse(*pieces: bytes) -> tuple[list[IncomingRequest], int | None]:
    """The requests in the bytes, and the status of the refusal that ended them."""
    parser = RequestParser()
    try:
        for piece in pieces:
            parser.feed(piece)
    except BadRequest as refusal:
        return list(parser.requests), refusal.status
    return list(parser.requests), None


def refused(data: bytes) -> int | None:
    """The status, where neither this request nor one smuggled behind it may become complete."""
    requests, status = parse(data + CANARY)
    assert [r.target for r in requests if r.complete] == []
    return status


def bodies(data: bytes) -> list[tuple[bytes, bytes]]:
    requests, status = parse(data)
    assert status is None
    return [(r.target, r.take_body()) for r in requests if r.complete]


def test_a_request_appears_with_its_head_and_its_body_follows() -> None:
    parser = RequestParser()
    parser.feed(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: gw:8000\r\nX-A:  b\r\nContent-Length: 5\r\n")
    assert (parser.in_head, parser.in_body, len(parser.requests)) == (True, False, 0)
    parser.feed(b"\r\nhe")

    (request,) = parser.requests
    assert (request.method, request.target, request.version) == ("POST", b"/v1/x?y=1", "1.1")
    assert request.headers == [(b"host", b"gw:8000"), (b"x-a", b"b"), (b"content-length", b"5")]
    assert (request.content_length, request.has_body, request.complete) == (5, True, False)
    assert (parser.in_head, parser.in_body, request.buffered) == (False, True, 2)
    assert request.take_body() == b"he"

    parser.feed(b"l")
    parser.feed(b"lo")
    assert (request.complete, request.buffered, parser.in_body) == (True, 3, False)
    assert (request.take_body(), request.take_body(), request.buffered) == (b"llo", b"", 0)


@pytest.mark.parametrize(
    ("version", "extra", "keep"),
    [
        (b"HTTP/1.1", b"", True),
        (b"HTTP/1.1", b"Connection: close\r\n", False),
        (b"HTTP/1.0", b"", False),
        (b"HTTP/1.0", b"Connection: keep-alive\r\n", True),
    ],
)
def test_keeping_the_connection_is_as_asked(version: bytes, extra: bytes, keep: bool) -> None:
    ((request,), _) = parse(head(extra, version=version))

    assert request.keep_alive is keep


def test_pipelined_requests_come_out_in_order() -> None:
    data = b"".join(head(method=b"GET", target=b"/%d" % i) for i in range(300))

    assert bodies(data) == [(b"/%d" % i, b"") for i in range(300)]


def test_nothing_behind_connection_close_is_a_request() -> None:
    requests, status = parse(head(b"Connection: close\r\n", b"GET") + CANARY)

    assert ([r.target for r in requests], status) == ([b"/x"], 400)


@pytest.mark.parametrize(
    ("framing", "status"),
    [
        (b"Content-Length: 4\r\n" + CHUNKED, 400),
        (CHUNKED + b"Content-Length: 4\r\n", 400),
        (b"Content-Length: 2\r\nContent-Length: 2\r\n", 400),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", 400),
        *[
            (b"Content-Length: %s\r\n" % value, 400)
            for value in (b"2, 2", b"+2", b"-1", b"0x2", b"1_0", b"1 0", b"", b"9" * 23, b"002")
        ],
        *[
            (b"Transfer-Encoding: %s\r\n" % value, 501)
            for value in (b"identity", b"xchunked", b"gzip, chunked", b'"chunked"', b"", b"a b")
        ],
        (CHUNKED + CHUNKED, 501),
        (b"Transfer-Encoding: chunked, chunked\r\n", 501),
        (b"Transfer-Encoding : chunked\r\n", 400),
        (b"Transfer-Encoding: \x0bchunked\r\n", 400),
        (b"Transfer-Encoding: chunked\x0c\r\n", 400),
        (b"Transfer-Encoding: chunked\x00\r\n", 400),
        (b"Transfer-Encoding\xa0: chunked\r\n", 400),
        (b"Transf\xe9r-Encoding: chunked\r\n", 400),
        (b"Transfer-Encoding:\r\n chunked\r\n", 400),
        (b"Transfer-Encoding\r\n: chunked\r\n", 400),
    ],
    ids=repr,
)
def test_a_body_whose_length_is_not_beyond_doubt_is_refused(framing: bytes, status: int) -> None:
    assert refused(head(framing) + b"0\r\n\r\n") == status


def test_chunks_in_http_1_0_are_refused() -> None:
    assert refused(head(CHUNKED, version=b"HTTP/1.0") + b"0\r\n\r\n") == 400


@pytest.mark.parametrize(
    "field",
    [b"X: a\r\n b", b"X: a\r\n\tb", b"X: a\rb", b"X: a\nb", b"X: \x00", b": a", b"X y: a", b"Xy"],
    ids=repr,
)
def test_a_malformed_header_is_refused(field: bytes) -> None:
    assert refused(head(field + b"\r\n")) == 400


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\n",
        b"GET / HTTP/1.1\rHost: a\r\r",
    ],
    ids=repr,
)
def test_bare_line_ends_are_refused(data: bytes) -> None:
    assert refused(data) == 400


@pytest.mark.parametrize(
    "chunks",
    [
        b"0x2\r\nab\r\n0\r\n\r\n",
        b"+2\r\nab\r\n0\r\n\r\n",
        b"-2\r\nab\r\n0\r\n\r\n",
        b"2\nab\r\n0\r\n\r\n",
        b"2\rab\r\n0\r\n\r\n",
        b"2;a\nab\r\n0\r\n\r\n",
        b"2 \r\nab\r\n0\r\n\r\n",
        b" 2\r\nab\r\n0\r\n\r\n",
        b"2\r\nabXX0\r\n\r\n",
        b"2\r\nab\n0\r\n\r\n",
        b"2\r\nab\r\n0\r\n\n",
        b"f" * 20 + b"\r\nab\r\n",
        b"\r\n\r\n",
        b";a\r\n\r\n",
        b"2\r\nab\r\n0\r\nX: a\r\n b\r\n\r\n",
        b"2\r\nab\r\n0\r\nContent-Length: 5\r\n\r\n",
    ],
    ids=repr,
)
def test_a_malformed_chunk_is_refused(chunks: bytes) -> None:
    assert refused(head(CHUNKED) + chunks) == 400


@pytest.mark.parametrize(
    ("chunks", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", b"abcde"),
        (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
        (b"2;0123456789abcdef\r\nab\r\n0\r\n\r\n", b"ab"),
        (b"2\r\nab\r\n0\r\nAuthorization: Bearer x\r\nHost: b\r\n\r\n", b"ab"),
    ],
    ids=repr,
)
def test_chunks_are_joined_and_trailers_are_dropped(chunks: bytes, body: bytes) -> None:
    requests, status = parse(head(CHUNKED) + chunks + CANARY)

    assert status is None
    assert [(r.target, r.take_body()) for r in requests] == [(b"/x", body), (b"/canary", b"")]
    assert requests[0].headers == [(b"host", b"a"), (b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize(
    "start",
    [
        head(CHUNKED) + b"2;",
        head(CHUNKED) + b"2\r\nab\r\n0\r\nX: ",
        head()[:-2] + b"X: ",
        b"GET /",
    ],
    ids=["chunk extension", "trailer", "header", "target"],
)
def test_what_never_ends_is_refused_before_it_takes_much_memory(start: bytes) -> None:
    _, status = parse(start, *[b"a" * 1024] * 30)

    assert status in {400, 414, 431}


def test_a_mebibyte_in_chunks_of_one_byte_is_read() -> None:
    data = head(CHUNKED) + b"1\r\na\r\n" * 2**16 + b"0\r\n\r\n"

    requests, status = parse(*(data[i : i + 1000] for i in range(0, len(data), 1000)))

    assert (status, requests[0].take_body()) == (None, b"a" * 2**16)


def host(value: bytes | None) -> bytes:
    field = b"" if value is None else b"Host: " + value + b"\r\n"
    return b"GET / HTTP/1.1\r\n" + field + b"\r\n"


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"a b",
        b"a/b",
        b"a@b",
        b"a\r\nHost: a",
        b"a:99999",
        b"a:",
        b"a:b",
        b"[::1",
        b"[x]",
    ],
    ids=repr,
)
def test_a_host_that_is_missing_or_malformed_is_refused(value: bytes | None) -> None:
    assert refused(host(value)) == 400


@pytest.mark.parametrize(
    "value", [b"a", b"gw.example:8000", b"127.0.0.1:65535", b"[::1]:80", b"[::1]"], ids=repr
)
def test_a_proper_host_is_taken(value: bytes) -> None:
    assert bodies(host(value)) == [(b"/", b"")]


def test_http_1_0_needs_no_host() -> None:
    assert bodies(b"GET / HTTP/1.0\r\n\r\n") == [(b"/", b"")]


@pytest.mark.parametrize(
    "target",
    [
        b"http://a/b",
        b"//\x80",
        b"*",
        b"x",
        b"?",
        b"/#f",
        b"/\x00",
        b"/\x7f",
        b"/\xff",
        b"/a\tb",
        b"",
    ],
    ids=repr,
)
def test_a_target_that_is_not_a_path_is_refused(target: bytes) -> None:
    assert refused(head(method=b"GET", target=target)) == 400


@pytest.mark.parametrize(
    ("method", "status"),
    [(b"CONNECT", 405), (b"TRACE", 405), (b"get", 400), (b"A" * 9000, 400), (b"G\x00T", 400)],
    ids=lambda value: repr(value)[:12],
)
def test_methods_that_no_gateway_serves_are_refused(method: bytes, status: int) -> None:
    assert refused(head(method=method)) == status


def test_connect_to_an_authority_is_not_allowed() -> None:
    assert refused(head(method=b"CONNECT", target=b"a:443")) == 405


@pytest.mark.parametrize(
    ("version", "status"),
    [
        (b"HTTP/1.2", 505),
        (b"HTTP/2.0", 505),
        (b"HTTP/0.9", 505),
        (b"HTTP/11", 400),
        (b"HTTP/1.11", 400),
        (b"http/1.1", 400),
        (b"HTTQ/1.1", 400),
        (b"", 400),
    ],
    ids=repr,
)
def test_only_http_1_0_and_1_1_are_spoken(version: bytes, status: int) -> None:
    assert refused(head(version=version)) == status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
        (bytes(range(256)), 400),
        (b"GET /\r\n", 400),
        (b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ],
    ids=["HTTP/2", "TLS", "SSH", "noise", "HTTP/0.9", "space"],
)
def test_other_protocols_are_refused(data: bytes, status: int) -> None:
    assert refused(data) == status


def test_empty_lines_before_a_request_are_skipped_but_not_for_ever() -> None:
    assert bodies(b"\r\n\r\n" + CANARY) == [(b"/canary", b"")]
    assert parse(*[b"\r\n" * 512] * 100) == ([], 400)


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (head(H2C, b"GET"), b""),
        (head(H2C + b"Content-Length: 0\r\n"), b""),
        (head(H2C + b"Content-Length: 3\r\n") + b"abc", b"abc"),
        (head(H2C + CHUNKED) + b"1\r\na\r\n2\r\nbc\r\n0\r\nX: y\r\n\r\n", b"abc"),
        (head(b"Upgrade: h2c\r\nContent-Length: 3\r\n") + b"abc", b"abc"),
        (head(b"Connection: Upgrade\r\nContent-Length: 3\r\n") + b"abc", b"abc"),
    ],
    ids=["no body", "empty", "length", "chunks", "no Connection", "no Upgrade"],
)
def test_an_offer_of_another_protocol_is_not_taken_up(data: bytes, body: bytes) -> None:
    expected = [(b"/x", body), (b"/canary", b"")]

    for cut in range(len(data)):
        requests, status = parse(data[:cut], data[cut:] + CANARY)
        assert status is None
        assert all(r.complete for r in requests)
        assert [(r.target, r.take_body()) for r in requests] == expected


def test_a_thousand_offers_in_one_piece_are_a_thousand_requests() -> None:
    requests, status = parse(head(H2C, b"GET") * 2000)

    assert (len(requests), status) == (2000, None)


def test_websockets_are_refused() -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: WebSocket\r\n"

    assert refused(head(upgrade, b"GET") + b"\x81\x05hello") == 400


@pytest.mark.parametrize(
    ("value", "status"), [(b"100-continue", None), (b"100-Continue", None), (b"foo", 417)], ids=repr
)
def test_only_100_continue_may_be_expected(value: bytes, status: int | None) -> None:
    requests, refusal = parse(head(b"Expect: " + value + b"\r\nContent-Length: 2\r\n"))

    assert refusal == status
    assert [r.expects_continue for r in requests] == ([True] if status is None else [])


def test_without_a_body_nothing_is_to_be_continued() -> None:
    ((request,), _) = parse(head(b"Expect: 100-continue\r\n"))

    assert not request.expects_continue


FIELD = b"X: " + b"a" * (MAX_HEADER_BYTES - 11 - len(b"Host: a\r\n")) + b"\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head(target=b"/" + b"a" * (MAX_TARGET - 1)), None),
        (head(target=b"/" + b"a" * MAX_TARGET), 414),
        (head(b"X: a\r\n" * (MAX_HEADERS - 1)), None),
        (head(b"X: a\r\n" * MAX_HEADERS), 431),
        (head(b"X: " + b"a" * 60_000 + b"\r\n"), 431),
        (head(FIELD), None),
        (head(FIELD + b"Y: abcdef\r\n"), 431),
        (head(FIELD, target=b"/" + b"a" * (MAX_TARGET - 1)), None),
    ],
    ids=["target", "long target", "100", "101", "60 kB", "16 KiB", "over 16 KiB", "all of it"],
)
def test_limits_hold_in_one_piece_and_byte_by_byte(data: bytes, status: int | None) -> None:
    assert parse(data)[1] == status
    assert parse(*(data[i : i + 1] for i in range(len(data))))[1] == status


def test_a_large_body_before_it_is_not_held_against_the_next_head() -> None:
    body = b"x" * 100_000
    data = head(b"Content-Length: 100000\r\n") + body + CANARY

    requests, status = parse(data[:-20], data[-20:])

    assert status is None
    assert [(r.target, r.take_body()) for r in requests] == [(b"/x", body), (b"/canary", b"")]


MESSAGES = st.lists(
    st.sampled_from(
        [
            CANARY,
            b"\r\n",
            head(b"Content-Length: 3\r\n") + b"abc",
            head(CHUNKED) + b"2;e=f\r\nab\r\n1\r\nc\r\n0\r\nT: u\r\n\r\n",
            head(H2C + b"Content-Length: 3\r\n") + b"abc",
            head(H2C + CHUNKED) + b"3\r\nabc\r\n0\r\n\r\n",
            head(b"Expect: 100-continue\r\nContent-Length: 1\r\n") + b"a",
            head(b"Content-Length: 2\r\nContent-Length: 2\r\n") + b"ab",
            head(b"Connection: close\r\n"),
            b"garbage",
        ]
    ),
    max_size=6,
)


@steady
@given(MESSAGES, st.lists(st.integers(0, 400), max_size=12))
def test_cuts_between_bytes_do_not_matter(messages: list[bytes], cuts: list[int]) -> None:
    data = b"".join(messages)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]

    def seen(*pieces: bytes) -> tuple[object, ...]:
        requests, status = parse(*pieces)
        return [(r.target, r.headers, r.take_body(), r.complete) for r in requests], status

    assert seen(*(data[a:b] for a, b in pairwise(edges))) == seen(data)


@steady
@given(
    st.binary(max_size=300), st.sampled_from([b"", head(), head(CHUNKED), head()[:-2], head(H2C)])
)
def test_no_bytes_raise_anything_but_bad_request(noise: bytes, start: bytes) -> None:
    parse(start + noise)
    parse(start, noise)
