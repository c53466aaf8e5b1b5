"""Header lists become requests by the rules that hold for HTTP/1.1."""

from __future__ import annotations

import pytest

from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.http2_request import read_request

Pairs = list[tuple[bytes, bytes]]


def pairs(*headers: tuple[bytes, bytes], method: bytes = b"POST", path: bytes = b"/v1/a") -> Pairs:
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", b"gateway:8000"),
        (b":path", path),
        *headers,
    ]


def refusal(found: Pairs) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read_request(found, complete=True)
    return caught.value


def test_the_authority_is_the_host() -> None:
    found = pairs((b"accept", b"*/*"), (b"host", b"elsewhere"), (b"content-length", b"3"))
    request = read_request(found, complete=False)

    assert (request.method, request.target, request.version) == ("POST", b"/v1/a", "2")
    assert request.fields.values(b"host") == [b"gateway:8000"]
    assert request.fields[b"accept"] == b"*/*"
    assert not any(name.startswith(b":") for name, _ in request.headers)
    assert (request.content_length, request.complete, request.has_body) == (3, False, True)


def test_a_host_will_do_for_an_authority() -> None:
    found = [pair for pair in pairs((b"host", b"gateway")) if pair[0] != b":authority"]

    assert read_request(found, complete=True).fields[b"host"] == b"gateway"


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (pairs(method=b"CONNECT"), 405),
        (pairs(method=b"TRACE"), 405),
        (pairs(method=b"get"), 400),
        (pairs(method=b"G\xffT"), 400),
        (pairs(path=b"*"), 400),
        (pairs(path=b"https://gateway/"), 400),
        (pairs(path=b"/\xc3\xa9"), 400),
        (pairs(path=b"/" + b"a" * 8192), 414),
        (pairs(*[(b"x-%d" % n, b"") for n in range(101)]), 431),
        (pairs((b"x", b"a" * 16 * 1024)), 431),
        (pairs((b"content-length", b"+1")), 400),
        (pairs((b"expect", b"200-ok")), 417),
        ([pair for pair in pairs() if pair[0] != b":authority"], 400),
        ([(b":method", b"CONNECT"), (b":authority", b"gateway:443")], 405),
    ],
)
def test_what_http_1_1_may_not_ask_for_may_not_be_asked_for_here(found: Pairs, status: int) -> None:
    assert refusal(found).status == status


def test_websockets_are_refused() -> None:
    found = [(b":protocol", b"websocket"), *pairs(method=b"CONNECT")]

    assert (refusal(found).status, str(refusal(found))) == (400, "WebSocket is not served here")


def test_whether_it_was_a_head_is_known_to_who_refuses_it() -> None:
    assert refusal(pairs(method=b"HEAD", path=b"*")).to_head
    assert not refusal(pairs(path=b"*")).to_head
