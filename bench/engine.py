"""A fast engine for measurements: canned answers from one bare epoll loop, so that it is never the
limit.

Whole requests get one chat completion at once.  Streams get ``max_tokens`` chunks (100 unless the
request says otherwise), ``seed`` of them a second (20 unless it says so): fields that every
gateway passes on, so that one engine serves every load.
"""

from __future__ import annotations

import argparse
import heapq
import json
import select
import socket
import time
from collections.abc import Iterator

import attrs
import httptools

CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":"token "},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":40,"total_tokens":52}}\n\n'
)
DONE = b"data: [DONE]\n\n"
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
# What routers ask before they trust an engine: health, the models, and what kind of engine it is.
ABOUT = json.dumps(
    {
        "object": "list",
        "data": [{"id": "bench", "object": "model", "created": 1, "owned_by": "bench"}],
        "status": "ok",
        "model_path": "bench",
        "served_model_name": "bench",
        "is_generation": True,
    }
).encode()
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
WHOLE = _HEAD % (len(ANSWER), ANSWER)
ANYTHING = _HEAD % (len(ABOUT), ABOUT)
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


PIECE = chunked(CHUNK)
END = chunked(LAST) + chunked(DONE) + b"0\r\n\r\n"
END_WITH_USAGE = chunked(LAST) + chunked(USAGE) + chunked(DONE) + b"0\r\n\r\n"


@attrs.define(eq=False)
class Client:
    """One connection, and what llhttp tells about the request that is being read from it."""

    sock: socket.socket
    body: bytes = b""
    complete: bool = False
    left: int = 0  # chunks of the stream that is under way
    pause: float = 0.0
    end: bytes = END
    parser: httptools.HttpRequestParser = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


class Engine:
    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=8192)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._clients: dict[int, Client] = {}
        self._due: list[tuple[float, int, Client]] = []
        self._serial = 0

    def run(self) -> None:
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else -1
            for fd, _ in self._epoll.poll(wait):
                if fd == self._listener.fileno():
                    self._accept()
                elif (client := self._clients.get(fd)) is not None:
                    self._read(client)
            self._send_what_is_due(time.monotonic())

    def _accept(self) -> None:
        for sock in self._accepted():
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._clients[sock.fileno()] = Client(sock)
            self._epoll.register(sock, select.EPOLLIN)

    def _accepted(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self._listener.accept()[0]
            except BlockingIOError:
                return

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(65536)
            client.parser.feed_data(data)
        except (OSError, httptools.HttpParserError):
            data = b""
        if not data:
            client.left = 0
            del self._clients[client.sock.fileno()]
            client.sock.close()
        elif client.complete:
            self._answer(client)

    def _answer(self, client: Client) -> None:
        body, client.body, client.complete = client.body, b"", False
        if client.parser.get_method() != b"POST":
            self._send(client, ANYTHING)
            return
        request = json.loads(body)
        if not request.get("stream"):
            self._send(client, WHOLE)
            return
        wants_usage = (request.get("stream_options") or {}).get("include_usage")
        client.end = END_WITH_USAGE if wants_usage else END
        # One router passes it on under its newer name.
        wanted = request.get("max_tokens") or request.get("max_completion_tokens")
        client.left = wanted or 100
        client.pause = 1 / (request.get("seed") or 20)
        self._send(client, EVENTS)
        self._schedule(client, time.monotonic())

    def _schedule(self, client: Client, when: float) -> None:
        self._serial += 1
        heapq.heappush(self._due, (when, self._serial, client))

    def _send_what_is_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            when, _, client = heapq.heappop(self._due)
            if client.left <= 0:
                continue
            client.left -= 1
            self._send(client, PIECE if client.left else PIECE + client.end)
            if client.left:
                self._schedule(client, when + client.pause)

    def _send(self, client: Client, data: bytes) -> None:
        try:
            client.sock.send(data)
        except OSError:  # gone, or does not read: it gets no more
            client.left = 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    Engine(parser.parse_args().port).run()


if __name__ == "__main__":
    main()
