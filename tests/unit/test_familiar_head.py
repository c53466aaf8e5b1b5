"""A head like the last one is recognised, and nothing else is taken for it."""

from __future__ import annotations

import random

import pytest

from citadel_gateway.wire.http1_request import RequestParser
from citadel_gateway.wire.http1_rules import BadRequest

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a:80\r\nAuthorization: Bearer k\r\n"
    b"Content-Length: %d\r\nUser-Agent: x/1\r\n\r\n"
)


def request(body: bytes, head: bytes = HEAD) -> bytes:
    return head % len(body) + body


def after(first: list[bytes], second: list[bytes]) -> list[object]:
    """What a parser that has read *first* makes of *second*: requests, or the refusal."""
    parser = RequestParser()
    for piece in first:
        parser.feed(piece)
    parser.requests.clear()
    try:
        for piece in second:
            parser.feed(piece)
    except BadRequest as refusal:
        return [refusal.status, str(refusal)]
    return [
        (r.method, r.target, r.version, r.fields.headers, dict(r.fields), r.keep_alive, r.has_body,
         r.content_length, r.complete, r.take_body())
        for r in parser.requests
    ]  # fmt: skip


def split(data: bytes) -> list[bytes]:
    """In two pieces, so that nothing is learnt from it."""
    end = data.index(b"\r\n\r\n") + 4
    return [data[:end], data[end:]]


def test_a_head_that_was_here_before_is_not_parsed_again() -> None:
    parser = RequestParser()
    parser.feed(request(b"one"))
    parser.feed(request(b"two"))
    first, second = parser.requests

    assert second.fields is first.fields
    assert (second.take_body(), second.complete) == (b"two", True)


def test_another_length_is_another_length() -> None:
    parser = RequestParser()
    parser.feed(request(b"one"))
    parser.requests[0].fields.findings = "found"
    parser.feed(request(b"eleven bytes"))
    second = parser.requests[1]

    assert second.fields[b"content-length"] == b"12"
    assert (b"content-length", b"12") in second.headers
    assert parser.requests[0].fields[b"content-length"] == b"3"
    assert (second.content_length, second.fields.findings) == (12, "found")


@pytest.mark.parametrize(
    "second",
    [
        request(b"x") + b"GET /canary HTTP/1.1\r\nHost: a\r\n\r\n",
        request(b"xyz")[:-1],
        (HEAD % 1)[:-4],
        request(b"xyz", HEAD.replace(b"Bearer k", b"Bearer l")),
        request(b"xyz", HEAD.replace(b"%d", b"+%d")),
        request(b"xyz", HEAD.replace(b"%d", b"0%d")),
        request(b"xyz", HEAD.replace(b"%d", b"%d, 3")),
        request(b"", HEAD),
        request(b"xyz", HEAD.replace(b"User-Agent: x/1", b"Connection: close")),
        request(b"xyz", HEAD.replace(b"User-Agent: x/1", b"Transfer-Encoding: chunked")),
    ],
)
def test_everything_else_is_parsed(second: bytes) -> None:
    first = request(b"abc")

    assert after([first], [second]) == after(split(first), [second])


@pytest.mark.parametrize(
    "first",
    [
        request(b"abc", HEAD.replace(b"User-Agent: x/1", b"Connection: close, x")),
        request(b"abc", HEAD.replace(b"User-Agent: x/1", b"Expect: 100-continue")),
        request(b"abc", HEAD.replace(b"User-Agent: x/1", b"Connection: Upgrade\r\nUpgrade: h2c")),
        request(b"abc", HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")),
        b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_heads_with_more_to_them_are_not_learnt(first: bytes) -> None:
    parser = RequestParser()
    parser.feed(first)
    if parser.requests[0].keep_alive:
        parser.feed(first)

    assert len({id(r.fields) for r in parser.requests}) == len(parser.requests)


def test_no_mutation_of_a_second_request_is_read_in_another_way() -> None:
    rng = random.Random(7)
    first = request(b'{"a": 1}')
    learnt = 0
    for _ in range(3000):
        second = bytearray(request(b'{"a": 1}' * rng.randrange(4)))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(second))
            match rng.randrange(3):
                case 0:
                    second[at] = rng.choice(b"0123456789\r\n: \x00aZ")
                case 1:
                    del second[at]
                case _:
                    second.insert(at, rng.choice(b"0123456789\r\n: \x00aZ"))
        cut = rng.randrange(len(second) + 1) if rng.random() < 0.2 else len(second)
        pieces = [bytes(p) for p in (second[:cut], second[cut:]) if p]

        found = after([first], pieces)
        assert found == after(split(first), pieces)
        learnt += bool(found) and isinstance(found[0], tuple)
    assert learnt > 500
