"""A fast engine for measurements: canned answers, llhttp on Trio, so that it is never the limit.

Whole requests get one chat completion at once; streams get N chunks at a fixed rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import httptools
import trio

CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":"token "},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
ANSWER = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * 40},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 40, "total_tokens": 52},
    }
).encode()
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(ANSWER),
    ANSWER,
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Request:
    """What llhttp tells about the request that is being read."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def serve(stream: trio.SocketStream, chunks: int, rate: float) -> None:
    try:
        await _serve(stream, chunks, rate)
    except (trio.BrokenResourceError, httptools.HttpParserError):
        await trio.aclose_forcefully(stream)


async def _serve(stream: trio.SocketStream, chunks: int, rate: float) -> None:
    request = Request()
    parser = httptools.HttpRequestParser(request)
    while data := await stream.receive_some(65536):
        parser.feed_data(bytes(data))
        if not request.complete:
            continue
        if b'"stream":true' in request.body.replace(b" ", b""):
            await _stream(stream, chunks, rate)
        else:
            await stream.send_all(WHOLE)
        request.__init__()  # type: ignore[misc]  # the parser holds on to this object


async def _stream(stream: trio.SocketStream, chunks: int, rate: float) -> None:
    piece = chunked(CHUNK)
    await stream.send_all(HEAD + piece)
    due = trio.current_time()
    for _ in range(chunks - 1):
        if rate:
            due += 1 / rate
            await trio.sleep_until(due)
        await stream.send_all(piece)
    await stream.send_all(chunked(LAST) + b"0\r\n\r\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--rate", type=float, default=20.0, help="chunks a second; 0: at once")
    arguments = parser.parse_args()
    handler: Callable[..., object] = lambda stream: serve(  # noqa: E731
        stream, arguments.chunks, arguments.rate
    )
    trio.run(trio.serve_tcp, handler, arguments.port)


if __name__ == "__main__":
    main()
