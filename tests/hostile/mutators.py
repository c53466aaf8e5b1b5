"""Requests that were good once. The same random numbers make the same ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.hostile.wire import Raw, chat_body, chunked, chunks, get, post

_BYTES = (b"\r", b"\n", b"\r\n", b"\x00", b":", b"\t", b" ", b"\x0b", b"\x0c", b"\x7f", b"\x80",
          b"\xff", b"\xa0", b";", b",", b"0", b"1", b"a", b"-", b"+", b"_", b"\"", b"\\", b"/",
          b"\r\n\r\n", b"\n\n", b"\r\r\n", b"%00", b"\r\n ", b"\r\n\t")  # fmt: skip
_FRAMING = (
    b"Content-Length: 0", b"Content-Length: 3", b"Content-Length: 5", b"content-length: 10000",
    b"Content-Length:", b"Content-Length: 00", b"Content-Length : 5", b"Content-Length: 1, 1",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding:chunked", b"transfer-encoding: Chunked",
    b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: chunked, x",
    b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: \x0bchunked",
    b"Transfer_Encoding: chunked",
    b"Connection: close", b"Connection: keep-alive", b"Connection: Transfer-Encoding",
    b"Connection: Content-Length", b"Host: other", b"Host:", b"Expect: 100-continue", b"Expect: x",
    b"Upgrade: h2c", b"Upgrade: websocket", b"TE: chunked", b"Trailer: Content-Length",
    b" folded", b"\tfolded", b"X", b"X: y\rZ: w", b"X: y\nContent-Length: 0", b"\x00", b":",
)  # fmt: skip
_METHODS = (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE", b"PRI", b"post",
            b"PATCH", b"FOO", b"POST ", b" POST", b"PO\x00ST", b"")  # fmt: skip
_VERSIONS = (b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1.1 ", b"HTTP/11", b"http/1.1",
            b"HTTP/0.9",
             b"HTTP/1.1\t", b"", b"HTTP/1.", b"HTTP/1.1x", b"RTSP/1.0", b"ICE/1.0")  # fmt: skip
_TARGETS = (b"*", b"http://gateway/v1/chat/completions", b"/v1/models", b"//", b"/", b"/\xff",
            b"/a b",
            b"gateway:80", b"/v1/completions", b"/v1/chat/completions?x=y",
            b"/v1/embeddings#x")  # fmt: skip
_SIZES = (b"0", b"00", b"1", b"0x1", b"-1", b"+1", b" 1", b"1 ", b"1;", b"1;a=b", b"1\x00", b"g",
            b"",
          b"ffffffffffffffff", b"10000000000000000", b"7fffffff", b"1\t", b"1;\n", b"1_0",
          b"1\r")  # fmt: skip

Mutation = Callable[[random.Random, bytes], bytes]


def mutant(rng: random.Random, model: str, mark: str) -> bytes:
    """A stream of one to three requests, spoilt in one to three places."""
    data = b"".join(_good(rng, model, f"{mark}.{i}") for i in range(rng.choice((1, 1, 2, 3))))
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 3))):
        data = rng.choice(_MUTATIONS)(rng, data)
    return data


def canary(model: str, mark: str) -> bytes:
    """What is pipelined behind: nobody must see it unless all before it was good."""
    return bytes(post(chat_body(model, f"canary-{mark}")))


def smuggled_encodings(model: str) -> Iterator[tuple[str, bytes]]:
    """Transfer-Encoding in every disguise of one byte, with and without a length beside it."""
    every = [*range(1, 0x20), *range(0x7F, 0x100)]
    for byte in every:
        b = bytes([byte])
        for where, line in {
            "before the name": b + b"Transfer-Encoding: chunked",
            "after the name": b"Transfer-Encoding" + b + b": chunked",
            "in the name": b"Transfer" + b + b"Encoding: chunked",
            "before the value": b"Transfer-Encoding: " + b + b"chunked",
            "for the space": b"Transfer-Encoding:" + b + b"chunked",
            "in the value": b"Transfer-Encoding: chun" + b + b"ked",
            "after the value": b"Transfer-Encoding: chunked" + b,
            "for the colon": b"Transfer-Encoding" + b + b"chunked",
            "after another value": b"X: y" + b + b"Transfer-Encoding: chunked",
            "in the line end": b"X: y\r" + b + b"Transfer-Encoding: chunked",
        }.items():
            body = chat_body(model, f"te-{byte:02x}-{where}")
            raw = chunked(body).without(b"transfer-encoding").plus(line)
            yield f"TE, {byte:02x} {where}", bytes(raw)
            sized = raw.plus(b"Content-Length: %d" % len(raw.body))
            yield f"TE, {byte:02x} {where}, and CL", bytes(sized)


def _good(rng: random.Random, model: str, mark: str) -> bytes:
    body = chat_body(model, mark)
    return bytes(rng.choice(_TEMPLATES)(rng, body))


def _sized(_: random.Random, body: bytes) -> Raw:
    return post(body)


def _in_chunks(rng: random.Random, body: bytes) -> Raw:
    trailers = rng.choice(((), (b"X: y",), (b"Content-Length: 3",)))
    extension = rng.choice((b"", b"", b";a=b", b";a"))
    return chunked(body, chunks(body, rng.choice((7, 40, 1000)), extension, trailers))


def _carrying(_: random.Random, body: bytes) -> Raw:
    """A body that is a request by itself: what a boundary in the wrong place would uncover."""
    return post(bytes(post(body)))


def _listing(rng: random.Random, body: bytes) -> Raw:
    return get(rng.choice((b"/v1/models", b"/nowhere", b"/health")))


def _old(rng: random.Random, body: bytes) -> Raw:
    raw = post(body, version=b"HTTP/1.0")
    return raw.plus(b"Connection: keep-alive") if rng.random() < 0.7 else raw


def _closing(_: random.Random, body: bytes) -> Raw:
    return post(body).plus(b"Connection: close")


def _fat(rng: random.Random, body: bytes) -> Raw:
    return post(body).plus(*(b"X-%d: %s" % (i, b"y" * rng.randrange(60)) for i in range(10)))


_TEMPLATES = (_sized, _sized, _sized, _in_chunks, _in_chunks, _in_chunks, _carrying, _listing, _old,
              _closing, _fat)  # fmt: skip


def _at(rng: random.Random, data: bytes) -> int:
    """A place: anywhere, or where it hurts, by a line's end, a colon or a framing field."""
    if rng.random() < 0.3:
        return rng.randrange(len(data) + 1)
    mark = rng.choice(
        (b"\r\n", b":", b"\r\n\r\n", b"Content-Length", b"Transfer-Encoding", b" ", b"chunked")
    )
    places = [i for i in range(len(data)) if data.startswith(mark, i)]
    if not places:
        return rng.randrange(len(data) + 1)
    at = rng.choice(places) + rng.choice((0, len(mark), rng.randrange(len(mark) + 1)))
    return min(at, len(data))


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + rng.choice(_BYTES) + data[at:]


def _insert_any(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + bytes([rng.randrange(256)]) + data[at:]


def _delete(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + data[at + rng.choice((1, 1, 1, 2, 3, 10)) :]


def _replace(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + rng.choice(_BYTES) + data[at + 1 :]


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = min(_at(rng, data), len(data) - 1)
    return (
        data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if data else data
    )


def _line(rng: random.Random, data: bytes, change: Callable[[bytes], bytes | None]) -> bytes:
    """Change one line of one head; `None` removes it."""
    head, mark, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    at = rng.randrange(len(lines))
    changed = change(lines[at])
    lines[at : at + 1] = [] if changed is None else [changed]
    return b"\r\n".join(lines) + mark + body


def _drop_line(rng: random.Random, data: bytes) -> bytes:
    return _line(rng, data, lambda line: None)


def _double_line(rng: random.Random, data: bytes) -> bytes:
    return _line(rng, data, lambda line: line + b"\r\n" + line)


def _add_line(rng: random.Random, data: bytes) -> bytes:
    return _line(rng, data, lambda line: line + b"\r\n" + rng.choice(_FRAMING))


def _fold_line(rng: random.Random, data: bytes) -> bytes:
    return _line(rng, data, lambda line: line.replace(b" ", b"\r\n ", 1))


def _harmless_line(rng: random.Random, data: bytes) -> bytes:
    harmless = (b"X: y", b"X:", b"X: \xe9", b"Accept: */*", b"TE: trailers", b"Upgrade: h2c")
    return _line(rng, data, lambda line: line + b"\r\n" + rng.choice(harmless))


def _case_line(rng: random.Random, data: bytes) -> bytes:
    return _line(rng, data, rng.choice((bytes.upper, bytes.lower, bytes.swapcase, bytes.title)))


def _swap_lines(rng: random.Random, data: bytes) -> bytes:
    head, mark, body = data.partition(b"\r\n\r\n")
    start, *fields = head.split(b"\r\n")
    rng.shuffle(fields)
    return b"\r\n".join([start, *fields]) + mark + body


def _start_line(rng: random.Random, data: bytes) -> bytes:
    line, mark, rest = data.partition(b"\r\n")
    parts = [*line.split(b" "), b"", b"", b""][:3]
    which, choices = rng.choice(((0, _METHODS), (1, _TARGETS), (2, _VERSIONS)))
    parts[which] = rng.choice(choices)
    return b" ".join(parts) + mark + rest


def _length(rng: random.Random, data: bytes) -> bytes:
    """A length that is a little off: the boundary moves."""
    before, mark, after = data.partition(b"Content-Length: ")
    digits, end, rest = after.partition(b"\r\n")
    if not mark or not digits.isdigit():
        return _insert(rng, data)
    size = int(digits) + rng.choice((-len(digits), -2, -1, 1, 2, 3, 40, -int(digits)))
    written = rng.choice((b"%d", b"%d", b"%d", b"0%d", b"+%d", b" %d ", b"%d,", b"%d\t")) % max(
        size, 0
    )
    return before + mark + written + end + rest


def _chunk_size(rng: random.Random, data: bytes) -> bytes:
    head, mark, body = data.partition(b"\r\n\r\n")
    lines = body.split(b"\r\n")
    sizes = [i for i, line in enumerate(lines) if line and len(line) < 12 and line[:1].isalnum()]
    if not sizes:
        return _insert(rng, data)
    lines[rng.choice(sizes)] = rng.choice(_SIZES)
    return head + mark + b"\r\n".join(lines)


def _splice(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of the stream again, elsewhere."""
    start = _at(rng, data)
    piece = data[start : start + rng.choice((5, 30, 120, 400))]
    at = _at(rng, data)
    return data[:at] + piece + data[at:]


def _cut(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] if at else data


_MUTATIONS: tuple[Mutation, ...] = (
    _insert, _insert, _insert, _insert_any, _delete, _delete, _replace, _replace, _flip, _drop_line,
    _double_line, _add_line, _add_line, _add_line, _fold_line, _case_line, _swap_lines, _swap_lines,
    _harmless_line, _harmless_line, _case_line, _start_line, _start_line, _length, _length,
    _chunk_size, _chunk_size, _splice, _cut,
)  # fmt: skip
