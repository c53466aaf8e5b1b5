"""Load driver: whole requests in a closed loop, or many streams at once.

One bare epoll loop, so that the driver is cheaper than what it drives.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import statistics
import sys
import time
from typing import Any

import attrs
import httptools

KEY = "sk-bench"


def encode(body: dict[str, Any], *, key: str = "") -> bytes:
    data = json.dumps(body).encode()
    credentials = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        "user-agent: bench/1.0\r\ncontent-type: application/json\r\n"
        f"{credentials}content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def request(*, streamed: bool, chunks: int, pace: int, key: str) -> bytes:
    body: dict[str, Any] = {
        "model": "bench",
        "messages": [{"role": "user", "content": "Say hello to the world in one sentence."}],
        "max_tokens": chunks if streamed else 40,
        "temperature": 0.7,
    }
    if streamed:
        body |= {"stream": True, "seed": pace}
    return encode(body, key=key)


@attrs.define(eq=False)
class Client:
    """One connection, and what llhttp tells about the answer that is being read from it."""

    sock: socket.socket
    began: float = 0.0
    chunks: int = 0
    done: bool = False  # `[DONE]` has been seen
    complete: bool = False
    closing: bool = False  # the server has said that this answer is the last one here
    parser: httptools.HttpResponseParser = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        # Events may be cut anywhere, and so may their first bytes; ends are as good to count.
        self.chunks += body.count(b'"content":"token "')
        self.done = self.done or b"[DONE]" in body

    def on_message_complete(self) -> None:
        self.complete = True
        self.closing = not self.parser.should_keep_alive()


@attrs.define
class Tally:
    done: int = 0
    failed: int = 0
    chunks: int = 0
    latencies: list[float] = attrs.field(factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        ordered = sorted(self.latencies)
        found: dict[str, Any] = {
            "requests": self.done,
            "failed": self.failed,
            "chunks": self.chunks,
            "seconds": round(seconds, 3),
        }
        if ordered:
            found["p50_ms"] = round(statistics.median(ordered) * 1000, 4)
            found["p99_ms"] = round(ordered[int(len(ordered) * 0.99)] * 1000, 4)
        return found


def connect(port: int) -> Client:
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Client(sock)


def read(client: Client) -> bool:
    """Take what has arrived; false when the connection has ended."""
    try:
        data = client.sock.recv(262144)
        client.parser.feed_data(data)
    except (OSError, httptools.HttpParserError):
        return False
    return bool(data)


def whole(port: int, connections: int, seconds: float, raw: bytes) -> dict[str, Any]:
    """Each connection sends its next request as soon as it has the answer to the last one."""
    tally, epoll = Tally(), select.epoll()
    clients: dict[int, Client] = {}
    began = time.monotonic()

    def begin() -> None:
        client = connect(port)
        clients[client.sock.fileno()] = client
        epoll.register(client.sock, select.EPOLLIN)
        client.began = time.monotonic()
        client.sock.sendall(raw)

    for _ in range(connections):
        begin()
    while clients:
        for fd, _ in epoll.poll(30):
            client = clients[fd]
            if not read(client):
                tally.failed += 1
                clients.pop(fd).sock.close()
                continue
            if not client.complete:
                continue
            now = time.monotonic()
            good = client.parser.get_status_code() == 200
            tally.done += good
            tally.failed += not good
            tally.latencies.append(now - client.began)
            client.complete = False
            over = now - began >= seconds
            if over or client.closing:
                clients.pop(fd).sock.close()
                if not over:
                    begin()
                continue
            client.began = now
            client.sock.sendall(raw)
    return tally.report(time.monotonic() - began)


def streams(port: int, connections: int, raw: bytes, over: float) -> dict[str, Any]:
    """One stream on each connection; they begin evenly spread over *over* seconds."""
    tally, epoll = Tally(), select.epoll()
    clients: dict[int, Client] = {}
    began, opened = time.monotonic(), 0
    while clients or opened < connections:
        now = time.monotonic()
        while opened < connections and now - began >= over * opened / connections:
            client = connect(port)
            clients[client.sock.fileno()] = client
            epoll.register(client.sock, select.EPOLLIN)
            client.began = time.monotonic()
            client.sock.sendall(raw)
            opened += 1
        soon = over / connections if opened < connections else 30
        for fd, _ in epoll.poll(soon):
            client = clients[fd]
            first = not client.chunks
            alive = read(client)
            if first and client.chunks:
                tally.latencies.append(time.monotonic() - client.began)
            if client.complete or not alive:
                good = client.complete and client.done and client.parser.get_status_code() == 200
                tally.done += good
                tally.failed += not good
                tally.chunks += client.chunks
                clients.pop(fd).sock.close()
    return tally.report(time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["whole", "streams"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of whole requests")
    parser.add_argument("--chunks", type=int, default=100, help="of each stream")
    parser.add_argument("--pace", type=int, default=20, help="chunks a second of each stream")
    parser.add_argument("--over", type=float, default=1.0, help="seconds in which streams begin")
    parser.add_argument("--key", default="", help="API key to show")
    a = parser.parse_args()
    raw = request(streamed=a.what == "streams", chunks=a.chunks, pace=a.pace, key=a.key)
    if a.what == "whole":
        report = whole(a.port, a.connections, a.seconds, raw)
    else:
        report = streams(a.port, a.connections, raw, a.over)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
