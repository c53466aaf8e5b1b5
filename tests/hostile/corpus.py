"""Requests that are wrong, odd, or only look odd, each with what must become of it.

Written from RFC 9112, the gateway's promises, and what HTTP/1 servers are known to have got wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import attrs

from tests.hostile.wire import CHAT, Raw, chat_body, chunked, chunks, get, post

ACCEPTED = frozenset({200})
BAD = frozenset({400})


@attrs.frozen
class Case:
    """`closes`: refused, and the connection with it; what is pipelined behind is not executed."""

    name: str
    data: bytes
    statuses: frozenset[int]
    closes: bool
    silent: bool = False  # may be closed without an answer
    method: bytes = b"POST"

    @property
    def is_accepted(self) -> bool:
        return self.statuses == ACCEPTED


def corpus(model: str) -> Iterator[Case]:
    """Every case for a lane's *model*."""
    yield from _framing(model)
    yield from _encodings(model)
    yield from _chunks(model)
    yield from _lines(model)
    yield from _fields(model)
    yield from _hosts(model)
    yield from _targets(model)
    yield from _methods_and_versions(model)
    yield from _upgrades(model)
    yield from _expectations(model)
    yield from _sizes(model)
    yield from _bodies(model)
    yield from _garbage()
    yield from _odd_but_good(model)


def _refused(name: str, raw: Raw | bytes, *statuses: int) -> Case:
    return Case(name, bytes(raw), frozenset(statuses or BAD), closes=True)


def _kept(name: str, raw: Raw | bytes, *statuses: int, method: bytes = b"POST") -> Case:
    """The application's refusal, or an answer: the connection may be used again."""
    return Case(name, bytes(raw), frozenset(statuses or ACCEPTED), closes=False, method=method)


def _framing(model: str) -> Iterator[Case]:
    body = chat_body(model)
    good, length = post(body), b"Content-Length: %d" % len(body)
    plain = good.without(b"content-length")
    smuggled = b"0\r\n\r\n" + bytes(get(b"/smuggled"))
    both = attrs.evolve(good, body=smuggled)
    yield _refused("CL then TE", plain.plus(b"Content-Length: 4", b"Transfer-Encoding: chunked"))
    yield _refused("CL then TE, smuggling", both.plus(b"Transfer-Encoding: chunked"))
    swapped = plain.plus(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(smuggled))
    yield _refused("TE then CL, smuggling", attrs.evolve(swapped, body=smuggled))
    right = chunked(body)
    yield _refused(
        "TE, and the CL of its encoding", right.plus(b"Content-Length: %d" % len(right.body))
    )
    yield _refused("TE and CL 0", right.plus(b"Content-Length: 0"))
    yield _refused("TE identity and CL", good.plus(b"Transfer-Encoding: identity"), 400, 501)
    yield _refused("CL twice, equal", good.plus(length))
    yield _refused("CL twice, apart", plain.plus(length, b"X: y", length))
    yield _refused("CL twice, different", good.plus(b"Content-Length: 2"))
    yield _refused("CL twice, one empty", good.plus(b"Content-Length:"))
    size = len(body)
    for value in (
        b"+%d" % size, b"-%d" % size, b"0x%x" % size, b"%d_0" % size, b"1 0", b"", b"9" * 23,
        b"%d, %d" % (size, size), b"%d,%d" % (size, size), b"%d;" % size, b"%d." % size,
        b"%d.0" % size, b"1e2", b"\x0b%d" % size, b"%d\x0c" % size, b"\xb2", b"%d\x00" % size,
        b"\xef\xbc\x91", b"a", b"18446744073709551616", b"\"%d\"" % size, b",%d" % size,
    ):  # fmt: skip
        yield _refused(f"CL {value!r}", plain.plus(b"Content-Length: " + value))
    yield Case(
        "HEAD with CL and TE",
        bytes(chunked(body).started(b"HEAD /v1/models HTTP/1.1").plus(b"Content-Length: 5")),
        BAD, closes=True, method=b"HEAD",
    )  # fmt: skip
    yield _refused("CL 00n", plain.plus(b"Content-Length: 00%d" % size))
    yield _refused("a space before the colon of CL", plain.plus(b"Content-Length : %d" % size))
    yield _refused("a tab before the colon of CL", plain.plus(b"Content-Length\t: %d" % size))


def closings(model: str) -> Iterator[tuple[str, bytes]]:
    """Good requests that do, or do not, end their connection; the oracle knows which."""
    for version in (b"HTTP/1.0", b"HTTP/1.1"):
        for options in (
            (), (b"close",), (b"Close",), (b"keep-alive",), (b"Keep-Alive",), (b"closed",),
            (b"close", b"keep-alive"), (b"keep-alive", b"close"), (b"close, keep-alive",),
            (b"keep-alive, close",), (b"x,close",), (b"close,x",), (b"\tclose\t",), (b"",),
            (b"keep-alive, x",), (b"x", b"close"), (b"upgrade",), (b",close",), (b"clo se",),
            (b"close",) * 2, (b"keep-alive",) * 2,
        ):  # fmt: skip
            for raw in (post(chat_body(model, "closing"), version=version), get()):
                start, *fields = raw.lines
                start = start.replace(b"HTTP/1.1", version)
                lines = (start, *fields, *(b"Connection: " + option for option in options))
                name = f"{start.decode()}, Connection {options}"
                yield name, bytes(attrs.evolve(raw, lines=lines))


def _encodings(model: str) -> Iterator[Case]:
    body = chat_body(model)
    plain = chunked(body).without(b"transfer-encoding")
    for value in (
        b"identity", b"xchunked", b"chunkedx", b"gzip, chunked", b"chunked, gzip", b'"chunked"',
        b"chunked, chunked", b"chunked,", b",chunked", b"chunked;q=1", b"", b"chun ked", b"gzip",
        b"chunked, identity", b"identity, chunked", b"x", b"cow", b"\x0bchunked", b"chunked\x0c",
        b"\x00chunked", b"chunked\x00", b"\xa0chunked", b"chunked\xa0", b"'chunked'", b"chunke",
        b"chunked\x7f", b"chunked\x80", b"chu\x6e\x1fked", b"cHuNkEd\xff",
    ):  # fmt: skip
        yield _refused(f"TE {value!r}", plain.plus(b"Transfer-Encoding: " + value), 400, 501)
    twice = b"Transfer-Encoding: chunked"
    yield _refused("TE twice", plain.plus(twice, twice), 400, 501)
    yield _refused(
        "TE twice, identity last", plain.plus(twice, b"Transfer-Encoding: identity"), 400, 501
    )
    yield _refused("TE folded", plain.plus(b"Transfer-Encoding:", b" chunked"), 400, 501)
    yield _refused(
        "TE behind a fold", plain.plus(b"X: y", b" Transfer-Encoding: chunked"), 400, 501
    )
    for line in (
        b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked",
        b" Transfer-Encoding: chunked",
        b"\tTransfer-Encoding: chunked", b"Transfer-Encoding\x00: chunked",
        b"Transfer\xadEncoding: chunked\xff\x01",
        b"Transfer-Encoding\x0b: chunked", b": chunked", b"Transfer Encoding: chunked",
        b"Transfer-Encoding chunked",
        b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked",
        b"X: y\x00\nTransfer-Encoding: chunked",
    ):  # fmt: skip
        yield _refused(f"{line!r}", plain.plus(line), 400, 501)
    old = plain.plus(b"Transfer-Encoding: chunked").started(b"POST /v1/chat/completions HTTP/1.0")
    yield _refused("TE in HTTP/1.0", old)
    yield _refused("TE in HTTP/1.0, kept", old.plus(b"Connection: keep-alive"))
    # A field by another name is no framing: there is no body, and the chunks are no request.
    for line in (b"Transfer_Encoding: chunked", b"X-Transfer-Encoding: chunked", b"TE: chunked"):
        behind = plain.plus(line)
        yield Case(f"{line!r} is no framing", bytes(behind), BAD, closes=False)


def _chunks(model: str) -> Iterator[Case]:
    body = chat_body(model)
    size = b"%x" % len(body)

    def case(name: str, encoded: bytes, *statuses: int) -> Case:
        return _refused(f"chunks: {name}", chunked(body, encoded), *statuses)

    whole = size + b"\r\n" + body + b"\r\n0\r\n\r\n"
    for bad in (
        b"0x" + size, b"+" + size, b"-" + size, size + b" ", b" " + size, size + b"\t", b"",
        b"g", size + b"h", b"f" * 20, b"1" + b"0" * 16, size + b",", size + b"\x00", b"\x0b" + size,
        size + b" 0", b"%d.0" % len(body), size + b"_", b"\xef\xbc\x91", size + b"\r", b"x" + size,
    ):  # fmt: skip
        yield case(f"size {bad!r}", whole.replace(size, bad, 1))
    rest = b"\r\n" + body + b"\r\n0\r\n\r\n"
    yield case("an extension with a bare LF", size + b";a\nb" + rest)
    yield case("an extension with a bare CR", size + b";a\rb" + rest)
    yield case("an extension with NUL", size + b";a=\x00" + rest)
    yield case("an extension of 2 KiB", size + b";" + b"a" * 2048 + rest)
    yield case("many extensions", chunks(body, 1, b";" + b"a" * 60))
    yield case("an extension without end", size + b";" + b"a" * 40000)
    yield case("a bare LF after the size", size + b"\n" + body + b"\r\n0\r\n\r\n")
    yield case("a bare CR after the size", size + b"\r" + body + b"\r\n0\r\n\r\n")
    yield case("a bare LF after the data", size + b"\r\n" + body + b"\n0\r\n\r\n")
    for wrong in (b"XX", b"\n\n", b"\r\r", b"\r0", b"00", b"\n\r"):
        yield case(f"{wrong!r} after the data", size + b"\r\n" + body + wrong + b"0\r\n\r\n")
    yield case("more data than said", size + b"\r\n" + body + b"x\r\n0\r\n\r\n")
    yield case("less data than said", b"%x\r\n" % (len(body) + 1) + body + b"\r\n0\r\n\r\n")
    yield case("bare LFs throughout", whole.replace(b"\r\n", b"\n"))
    yield case("the last chunk and a bare LF", size + b"\r\n" + body + b"\r\n0\n\r\n")
    yield case("a trailer without a colon", size + b"\r\n" + body + b"\r\n0\r\ntrailer\r\n\r\n")
    yield case("a trailer with a bare LF", size + b"\r\n" + body + b"\r\n0\r\na: b\nc: d\r\n\r\n")
    yield case("a folded trailer", size + b"\r\n" + body + b"\r\n0\r\na: b\r\n c\r\n\r\n")
    yield case("a trailer with NUL", size + b"\r\n" + body + b"\r\n0\r\na: \x00\r\n\r\n")
    yield case("a trailer without a name", size + b"\r\n" + body + b"\r\n0\r\n: b\r\n\r\n")
    endless = size + b"\r\n" + body + b"\r\n0\r\n" + b"a: b\r\n" * 12000
    yield case("trailers without end", endless, 400, 431)
    yield case(
        "one trailer without end", size + b"\r\n" + body + b"\r\n0\r\na: " + b"b" * 70000, 400, 431
    )


def _lines(model: str) -> Iterator[Case]:
    good = post(chat_body(model))
    head, _, body = bytes(good).partition(b"\r\n\r\n")
    yield _refused("bare LFs throughout", head.replace(b"\r\n", b"\n") + b"\n\n" + body)
    yield _refused("bare CRs throughout", head.replace(b"\r\n", b"\r") + b"\r\r" + body)
    yield _refused(
        "a bare LF after the request line", head.replace(b"\r\n", b"\n", 1) + b"\r\n\r\n" + body
    )
    yield _refused(
        "a bare CR after the request line", head.replace(b"\r\n", b"\r", 1) + b"\r\n\r\n" + body
    )
    yield _refused("CR CR LF", head.replace(b"\r\n", b"\r\r\n", 1) + b"\r\n\r\n" + body)
    yield _refused("the head ends in LF LF", head + b"\n\n" + body)
    yield _refused("the head ends in CRLF LF", head + b"\r\n\n" + body)
    yield _refused("the head ends in LF CRLF", head + b"\n\r\n" + body)
    yield _refused("the head ends in CRLF CR X", head + b"\r\n\rX" + body)
    for name, line in {
        "an obs-fold": b"X: a\r\n b",
        "an obs-fold by a tab": b"X: a\r\n\tb",
        "an obs-fold of nothing": b"X:\r\n ",
        "a space before the first name": b" X: y",
        "a field without a colon": b"nonsense",
        "a field without a name": b": y",
        "a name with a space": b"X Y: z",
        "a space before the colon": b"X : y",
        "a name with NUL": b"X\x00: y",
        "a name with a high byte": b"X\xe9: y",
        "a name with a slash": b"X/Y: z",
        "a name with brackets": b"X(Y): z",
        "a name with a quote": b'X"Y: z',
        "a name with a DEL": b"X\x7f: z",
        "a value with NUL": b"X: a\x00b",
        "a value with a bare CR": b"X: a\rb",
        "a value with a bare LF": b"X: a\nb",
        "a value ending in CR": b"X: a\r",
        "a value with a bell": b"X: a\x07b",
        "a value with DEL": b"X: a\x7fb",
        "a value with VT": b"X: a\x0bb",
    }.items():
        yield _refused(name, good.plus(line))
        start, *fields = good.lines
        yield _refused(f"{name}, first", attrs.evolve(good, lines=(start, line, *fields)))


def _fields(model: str) -> Iterator[Case]:
    good = post(chat_body(model))
    json_type = b"Content-Type: application/json"
    # The application's own refusals: the request is well framed.
    yield _kept("Content-Type twice", good.plus(json_type), 400)
    yield _kept(
        "Content-Type text/plain",
        good.without(b"content-type").plus(b"Content-Type: text/plain"),
        415,
    )
    yield _kept("Content-Encoding gzip", good.plus(b"Content-Encoding: gzip"), 415)
    for line in (
        b"Content_Length: 3", b"X_Api_Key: y", b"Remote-Addr: 1.2.3.4", b"Cookie: a=b",
        b"Connection: Authorization, X-Request-Id", b"Connection: keep-alive, keep-alive",
        b"Keep-Alive: timeout=5", b"Proxy-Connection: close", b"TE: trailers", b"Trailer: Expires",
        b"X-Forwarded-For: 1.2.3.4", b"Via: 1.1 other", b"X-Citadel-Timeout: 20", b"X:", b"X: \t ",
        b"X-Latin: caf\xe9", b"X:y", b"X:   y   ", b"!#$%&'*+-.^_`|~09: token", b"Range: bytes=0-1",
        b"If-Match: *", b"Content-Length-X: 3", b"Upgrade-Insecure-Requests: 1",
        b"X-Request-Id: a\tb", b"traceparent: rubbish",
    ):  # fmt: skip
        # A name with `_` may be refused; and llhttp takes Proxy-Connection for Connection.
        status = (200, 400) if b"_" in line or b"Proxy" in line else (200,)
        yield _kept(f"a field {line!r}", good.plus(line), *status)


def _hosts(model: str) -> Iterator[Case]:
    bare = post(chat_body(model)).without(b"host")
    yield _refused("no Host", bare)
    yield _refused("Host twice", bare.plus(b"Host: a", b"Host: a"))
    for value in (
        b"", b"a b", b"a/b", b"a@b", b"a:99999", b"a:b", b"[::1", b"a,b", b"http://a/", b"a?b",
        b"a#b", b"a\\b", b"a\xe9", b"a:", b":80", b"a:80:80", b"[::1]x", b"a:-1", b"<a>",
    ):  # fmt: skip
        if value in {b"a,b", b"a:"}:  # both are in the grammar
            yield _kept(f"Host {value!r}", bare.plus(b"Host: " + value), 200, 400)
        else:
            yield _refused(f"Host {value!r}", bare.plus(b"Host: " + value))


def _targets(model: str) -> Iterator[Case]:
    good = post(chat_body(model))
    for target in (
        b"http://gateway/v1/chat/completions", b"http://evil/v1/chat/completions", b"*", b"?",
        b"v1/models",
        b"gateway:80", b"/v1/\xe9", b"/v1/a\x00b", b"/v1/a\x01", b"/v1/\x7f",
        b"/v1/chat/completions#x",
        b"", b"/v1 /models", b"/v1\t/models", b"\\v1", b"//[::1",
    ):  # fmt: skip
        if target == b"//[::1":
            continue
        raw = good.started(b"POST %s HTTP/1.1" % target)
        yield _refused(f"target {target!r}", raw, 400, 404, 405, 505)
    for target in (
        b"/v1/%2e%2e/admin", b"//v1/chat/completions", b"/v1/chat/completions;x", b"/v1/%00",
        b"/v1/%ff",
        b"/v1/chat%252fcompletions", b"/v1/./chat/completions", b"/v1/../v1/chat/completions",
        b"/%",
        b"/v1/chat/completions/", b"/v1/%zz", b"/admin", b"/v1/chat\\completions",
        b"/%76%31/nothing", b"//", b"/" + b"a" * 4000,
    ):  # fmt: skip
        raw = good.started(b"POST %s HTTP/1.1" % target)
        yield _kept(f"target {target[:60]!r}", raw, 400, 404, 405)
    yield _kept("a query", good.started(b"POST /v1/chat/completions?a=b&c=%00 HTTP/1.1"))
    yield _refused("OPTIONS *", get().started(b"OPTIONS * HTTP/1.1"), 400, 404, 405)
    long = good.started(b"POST /%s HTTP/1.1" % (b"a" * 9000))
    yield _refused("a target of 9 000 bytes", long, 414)
    yield _refused(
        "a target of 60 000 bytes", good.started(b"POST /%s HTTP/1.1" % (b"a" * 60000)), 414, 431
    )
    yield _refused("an endless target", b"GET /" + b"a" * 100_000, 414, 431)


def _methods_and_versions(model: str) -> Iterator[Case]:
    good = post(chat_body(model))
    path = b"/v1/chat/completions"
    for method in (b"CONNECT", b"TRACE", b"PRI", b"post", b"Post", b"P\x00ST", b"PO ST",
        b"P" * 9000,
                   b"POSTT", b"", b"P@ST", b"\xe9", b"\"POST\""):  # fmt: skip
        raw = good.started(b"%s %s HTTP/1.1" % (method, path))
        yield _refused(f"method {method[:20]!r}", raw, 400, 405, 414, 431, 501, 505)
    yield _refused("CONNECT host:port", good.started(b"CONNECT gateway:80 HTTP/1.1"), 400, 405, 501)
    for method in (b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"GET"):
        raw = good.started(b"%s %s HTTP/1.1" % (method, path))
        yield _kept(f"method {method!r} with a body", raw, 400, 405, 501)
    yield _kept("HEAD", get().started(b"HEAD /v1/models HTTP/1.1"), 200, method=b"HEAD")
    for method in (b"PROPFIND", b"SOURCE", b"M-SEARCH", b"QUERY", b"FOO"):
        raw = good.started(b"%s %s HTTP/1.1" % (method, path))
        yield Case(f"method {method!r}", bytes(raw), frozenset({400, 404, 405, 501}), closes=False)
    for version in (
        b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"HTTQ/1.1", b"http/1.1", b"HTTP/1.1x", b"HTTP/1.10",
        b"HTTP/01.1", b"HTTP/1,1", b"HTTP/1", b"HTTP/11", b"HTTP/1.1 ", b"HTTP/ 1.1",
        b"HTTP/1.\xb9",
        b"", b"ICE/1.0", b"RTSP/1.0", b"HTTP 1.1", b"HTTP/9.9", b"HTTP/-1.1", b"HTTP/1.1\x00",
    ):  # fmt: skip
        raw = good.started(b"POST %s %s" % (path, version))
        yield _refused(f"version {version!r}", raw, 400, 505)
    for line in (
        b"SOURCE /v1/models ICE/1.0",
        b"GET /v1/models RTSP/1.0",
        b"GET /v1/models ICE/1.0",
    ):
        yield _refused(f"{line!r}", get().started(line), 400, 405, 501, 505)
    yield _refused("HTTP/0.9", b"GET /v1/models\r\n\r\n", 400, 505)
    yield _refused(
        "two spaces before the target", good.started(b"POST  %s HTTP/1.1" % path), 400, 505
    )
    yield _refused(
        "two spaces before the version", good.started(b"POST %s  HTTP/1.1" % path), 400, 505
    )
    yield _refused("a tab for a space", good.started(b"POST\t%s\tHTTP/1.1" % path), 400, 505)
    yield _refused("a space before the method", b" " + bytes(good), 400, 505)
    yield _refused("a form feed for a space", good.started(b"POST\x0c%s HTTP/1.1" % path), 400, 505)
    yield _refused(
        "the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(24), 400, 505
    )
    yield _refused("a response", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400, 505)


def _upgrades(model: str) -> Iterator[Case]:
    body = chat_body(model)
    key = (b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13")
    socket = get().plus(b"Upgrade: websocket", b"Connection: Upgrade", *key)
    yield _refused("WebSocket", socket, 400, 426)
    yield _refused("WebSocket and early bytes", bytes(socket) + b"\x81\x05hello", 400, 426)
    for raw, kind in ((post(body), "sized"), (chunked(body), "chunked")):
        for settings in (
            (),
            (b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",),
            (b"HTTP2-Settings: \xff!",),
        ):
            offer = raw.plus(b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", *settings)
            yield _kept(f"h2c, {kind}, {settings!r}", offer, 200, 400)
            yield _kept(
                f"h2c without Connection, {kind}", raw.plus(b"Upgrade: h2c", *settings), 200, 400
            )
    yield _kept(
        "h2c without a body",
        get().plus(b"Upgrade: h2c", b"Connection: upgrade"),
        200,
        method=b"GET",
    )
    yield _kept("an unknown upgrade", post(body).plus(b"Upgrade: foo/2", b"Connection: upgrade"))


def _expectations(model: str) -> Iterator[Case]:
    good = post(chat_body(model))
    yield _kept("100-continue, not waited for", good.plus(b"Expect: 100-continue"))
    yield _kept("100-Continue", good.plus(b"Expect: 100-Continue"))
    yield _kept("100-continue in HTTP/1.0",
    good.started(b"POST /v1/chat/completions HTTP/1.0").plus(
        b"Connection: keep-alive", b"Expect: 100-continue"))  # fmt: skip
    yield _refused("another expectation", good.plus(b"Expect: foo"), 417)
    yield _refused("an empty expectation", good.plus(b"Expect:"), 400, 417)
    yield _refused("two expectations", good.plus(b"Expect: 100-continue", b"Expect: foo"), 400, 417)
    yield _refused("two expectations in one", good.plus(b"Expect: 100-continue, foo"), 400, 417)


def _sizes(model: str) -> Iterator[Case]:
    good = post(chat_body(model))
    yield _refused("a field of 60 KB", good.plus(b"X: " + b"y" * 60_000), 431)
    yield _refused("a field of 200 KB", good.plus(b"X: " + b"y" * 200_000), 431)
    yield _refused("a field of 17 KB", good.plus(b"X: " + b"y" * 17_000), 431)
    yield _refused("a name of 17 KB", good.plus(b"X" * 17_000 + b": y"), 431)
    yield _refused("4 000 fields", good.plus(*(b"X%d: y" % i for i in range(4000))), 431)
    yield _refused("101 fields", good.plus(*(b"X%d: y" % i for i in range(98))), 431)
    yield _kept("100 fields", good.plus(*(b"X%d: y" % i for i in range(96))))
    yield _kept("a field of 15 KB", good.plus(b"X: " + b"y" * 15_000))
    huge = good.without(b"content-length").plus(b"Content-Length: %d" % (8 * 2**20 + 1))
    yield Case("CL one above the limit", bytes(huge), frozenset({413}), closes=True)
    endless = good.without(b"content-length").plus(b"Content-Length: 9999999999999999")
    yield Case("CL of sixteen digits", bytes(endless), frozenset({400, 413}), closes=True)
    filler = chunked(b"", b"100000\r\n" + b" " * 2**20 + b"\r\n")
    above = attrs.evolve(filler, body=filler.body * 9)
    yield Case("chunks that pass the limit", bytes(above), frozenset({413}), closes=True)


def _bodies(model: str) -> Iterator[Case]:
    """Well framed, and nothing for an engine."""
    known = b'"model":"%s","messages":[{"role":"user","content":"hi"}]' % model.encode()
    for body in (
        b"", b"{", b"[]", b'"text"', b"12", b"null", b"nonsense", b"[" * 50_000, b"{" * 2000,
        b"\xff\xfe{\x00}\x00",
        b'{"a":' * 5000 + b"1" + b"}" * 5000, b"\xef\xbb\xbf{" + known + b"}",
        b"{" + known + b"} and more",
        b"{" + known + b',"seed":' + b"9" * 5000 + b"}", b"{" + known + b',"x":NaN}',
        b"{" + known + b',"x":"\xff"}',
        b"{" + known + b',"x":"\\ud800"}', b"{" + known + b"," + known + b"}",
        b"{" + known + b',"n":0}',
        b"{" + known + b',"stream":"true"}', b"{" + known + b',"stream":1}',
        b"{" + known + b',"max_tokens":-1}',
        b"{" + known + b',"temperature":"hot"}', b"{" + known + b',"x":1e400}',
        b"{" + known + b',"x":"\x00"}',
        b"{" + known + b',"stream_options":{"include_usage":true}}', b"\x00" * 100, b"\r\n" * 100,
    ):  # fmt: skip
        tolerated = b'"\\ud800"' in body or b"1e400" in body
        statuses = (400, 200) if tolerated else (400,)
        yield _kept(f"body {body[:20]!r}...{body[-30:]!r}", post(body), *statuses)
    for name in (b"nope", b"../../x", b"m\\r\\nx: y", b"x" * 10_000):
        body = b'{"model":"%s","messages":[{"role":"user","content":"hi"}]}' % name
        yield _kept(f"model {name[:20]!r}", post(body), 400, 404)
    request = bytes(get(b"/inner"))
    yield _kept("a body that is a request", post(request), 400)
    yield _kept("a body that is two chunks", post(b"5\r\nhello\r\n0\r\n\r\n"), 400)


def _garbage() -> Iterator[Case]:
    hello = (
        bytes.fromhex("1603010200010001fc0303") + os.urandom(0) + bytes(range(256)) + b"\x00" * 200
    )
    noise = bytes((i * 7919 + i // 3) % 256 for i in range(65536))
    for name, data in {
        "a TLS ClientHello": hello,
        "an SSH banner": b"SSH-2.0-OpenSSH_9.6\r\n",
        "64 KiB of noise": noise,
        "NULs": b"\x00" * 5000,
        "high bytes": b"\xff" * 5000,
        "SMTP": b"EHLO example.org\r\nMAIL FROM:<a@example.org>\r\n",
        "a line of spaces": b" " * 9000,
        "a PROXY line": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n",
        "RESP": b"*1\r\n$4\r\nPING\r\n",
        "JSON": b'{"jsonrpc":"2.0","method":"x"}\n',
    }.items():
        yield Case(name, data, frozenset({400, 431, 505, 501}), closes=True, silent=True)


def _odd_but_good(model: str) -> Iterator[Case]:
    body = chat_body(model)
    good = post(body)
    yield _kept("as plain as can be", good)
    yield _kept("a CRLF before it", b"\r\n" + bytes(good))
    yield _kept("names in lower case", bytes(good).replace(b"Content-Length", b"content-length"))
    yield _kept("names in upper case", bytes(good).replace(b"Content-Length", b"CONTENT-LENGTH"))
    yield _kept(
        "no space after the colon", bytes(good).replace(b"Content-Length: ", b"Content-Length:")
    )
    yield _kept(
        "spaces around a length", bytes(good).replace(b"Content-Length: ", b"Content-Length: \t  ")
    )
    yield _kept(
        "Chunked", chunked(body).without(b"transfer-encoding").plus(b"Transfer-Encoding: Chunked")
    )
    # Both are in the grammar, and both may be refused: a gateway needs neither.
    yield _kept("spaces around chunked", chunked(body).without(b"transfer-encoding").plus(
        b"Transfer-Encoding: \t chunked \t "), 200, 400, 501)  # fmt: skip
    yield _kept("two chunks", chunked(body))
    yield _kept("chunks of one byte", chunked(body, chunks(body, 1)))
    yield _kept("a short extension", chunked(body, chunks(body, 50, b";name=value")))
    yield _kept(
        "a quoted extension", chunked(body, chunks(body, len(body), b';name="quoted; = value"'))
    )
    yield _kept(
        "sizes in upper case", chunked(body, b"%X\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
    )
    yield _kept(
        "a size with zeros", chunked(body, b"000%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
    )
    yield _kept(
        "a last chunk of many zeros",
        chunked(body, b"%x\r\n" % len(body) + body + b"\r\n0000\r\n\r\n"),
    )
    trailers = (
        b"Content-Length: 3",
        b"Authorization: Bearer x",
        b"Host: evil",
        b"Transfer-Encoding: x",
    )
    yield _kept("trailers", chunked(body, chunks(body, trailers=trailers)), 200, 400)
    yield _kept("a harmless trailer", chunked(body, chunks(body, trailers=trailers[1:2])))
    spaced = body + b" " * 100_000
    yield _kept("a body of 100 KB", post(spaced))
    yield _kept(
        "a body of 100 KB in chunks of 7", chunked(spaced[:30_000], chunks(spaced[:30_000], 7))
    )
    yield _kept("HTTP/1.0, kept", good.started(b"POST /v1/chat/completions HTTP/1.0").plus(
        b"Connection: keep-alive"))  # fmt: skip
    yield _kept("GET with a length of 0", get().plus(b"Content-Length: 0"), method=b"GET")
    yield _kept(
        "GET with a body",
        attrs.evolve(get().plus(b"Content-Length: 5"), body=b"hello"),
        method=b"GET",
    )
    yield _kept("GET with chunks", attrs.evolve(
        get().plus(b"Transfer-Encoding: chunked"), body=b"5\r\nhello\r\n0\r\n\r\n"),
        method=b"GET")  # fmt: skip
    for name in (CHAT, b"/v1/completions", b"/v1/embeddings"):
        fields = (
            b'{"model":"%s","prompt":"x","input":"x","messages":[{"role":"user","content":"x"}]}'
        )
        yield _kept(f"{name!r}", post(fields % model.encode(), name))
