"""Load driver: whole requests in a closed loop, or many streams at once.

One bare epoll loop, so that the driver is cheaper than what it drives.  Prints one JSON object.

With several ports the connections are dealt out to them in turn.  With ``--watch PID`` it also
reports what that process, or those, and all below used meanwhile.  For streams that is a window of
``--window`` seconds which begins once every stream has had its first chunk: what opening and
closing cost is not in it.  Streams must be long enough for that; the report's ``window`` says how
many were open at its end.  With ``--leave`` all clients hang up after the window, and a stream that
is open and well until then counts as done.  After ``--within`` seconds the driver gives up, and
what is not done has failed.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import attrs
import httptools

from bench.processes import cpu_seconds, resident_mb


def encode(body: dict[str, Any], *, key: str = "", request_id: str = "") -> bytes:
    data = json.dumps(body).encode()
    extra = f"authorization: Bearer {key}\r\n" if key else ""
    extra += f"x-request-id: {request_id}\r\n" if request_id else ""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        "user-agent: bench/1.0\r\ncontent-type: application/json\r\n"
        f"{extra}content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def request(
    *, streamed: bool, chunks: int = 100, pace: int = 20, key: str = "", request_id: str = ""
) -> bytes:
    body: dict[str, Any] = {
        "model": "bench",
        "messages": [{"role": "user", "content": "Say hello to the world in one sentence."}],
        "max_tokens": chunks if streamed else 40,
        "temperature": 0.7,
    }
    if streamed:
        body |= {"stream": True, "seed": pace}
    return encode(body, key=key, request_id=request_id)


@attrs.define(eq=False)
class Client:
    """One connection, and what llhttp tells about the answer that is being read from it."""

    sock: socket.socket
    port: int
    began: float = 0.0
    chunks: int = 0
    last: float = 0.0  # when the last chunk came
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

    @property
    def good(self) -> bool:
        return self.complete and self.parser.get_status_code() == 200


@attrs.define
class Tally:
    done: int = 0
    failed: int = 0
    chunks: int = 0
    gap: float = 0.0  # the largest one between two chunks of a stream
    latencies: list[float] = attrs.field(factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        ordered = sorted(self.latencies)
        found: dict[str, Any] = {
            "requests": self.done,
            "failed": self.failed,
            "seconds": round(seconds, 3),
        }
        if self.chunks:
            found |= {"chunks": self.chunks, "largest_gap_ms": round(self.gap * 1000, 2)}
        if ordered:
            found["p50_ms"] = round(statistics.median(ordered) * 1000, 4)
            found["p99_ms"] = round(ordered[int(len(ordered) * 0.99)] * 1000, 4)
        return found


@attrs.define
class Window:
    """What the watched processes use between two moments."""

    watch: Sequence[int]
    seconds: float
    began: float = 0.0
    chunks: int = 0
    cpu: float = 0.0
    found: dict[str, Any] | None = None

    @property
    def is_open(self) -> bool:
        return bool(self.began) and self.found is None

    def begin(self, chunks: int) -> None:
        self.began, self.chunks, self.cpu = time.monotonic(), chunks, _cpu(self.watch)

    def end(self, chunks: int, streams: int) -> None:
        self.found = {
            "cpu_s": _cpu(self.watch) - self.cpu,
            "chunks": chunks - self.chunks,
            "seconds": round(time.monotonic() - self.began, 3),
            "open": streams,
            "resident_mb": _resident(self.watch),
        }


def _cpu(watched: Sequence[int]) -> float:
    return sum(map(cpu_seconds, watched))


def _resident(watched: Sequence[int]) -> float:
    return round(sum(map(resident_mb, watched)), 2)


def connect(port: int) -> Client:
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Client(sock, port)


def read(client: Client) -> bool:
    """Take what has arrived; false when the connection has ended."""
    try:
        data = client.sock.recv(262144)
        client.parser.feed_data(data)
    except (OSError, httptools.HttpParserError):
        return False
    return bool(data)


def whole(
    ports: Sequence[int], connections: int, seconds: float, raw: bytes, watch: Sequence[int]
) -> dict[str, Any]:
    """Each connection sends its next request as soon as it has the answer to the last one."""
    tally, epoll = Tally(), select.epoll()
    clients: dict[int, Client] = {}

    def begin(port: int) -> None:
        client = connect(port)
        clients[client.sock.fileno()] = client
        epoll.register(client.sock, select.EPOLLIN)
        client.began = time.monotonic()
        client.sock.sendall(raw)

    cpu, began = _cpu(watch), time.monotonic()
    for number in range(connections):
        begin(ports[number % len(ports)])
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
            tally.done += client.good
            tally.failed += not client.good
            tally.latencies.append(now - client.began)
            client.complete = False
            over = now - began >= seconds
            if over or client.closing:
                clients.pop(fd).sock.close()
                if not over:
                    begin(client.port)
                continue
            client.began = now
            client.sock.sendall(raw)
    report = tally.report(time.monotonic() - began)
    if watch:
        report |= {"cpu_s": _cpu(watch) - cpu, "resident_mb": _resident(watch)}
    return report


def streams(
    ports: Sequence[int],
    connections: int,
    raw: bytes,
    *,
    over: float,
    window: Window,
    leave: bool,
    within: float,
) -> dict[str, Any]:
    """One stream on each connection; they begin evenly spread over *over* seconds."""
    tally, epoll = Tally(), select.epoll()
    clients: dict[int, Client] = {}
    began, opened, refused = time.monotonic(), 0, 0
    while clients or opened < connections:
        now = time.monotonic()
        while opened < connections and now - began >= over * opened / connections:
            client = connect(ports[opened % len(ports)])
            clients[client.sock.fileno()] = client
            epoll.register(client.sock, select.EPOLLIN)
            client.began = time.monotonic()
            client.sock.sendall(raw)
            opened += 1
        if now - began > within:
            if leave:
                tally.done += sum(1 for client in clients.values() if client.chunks)
            tally.failed = connections - tally.done
            break
        soon = over / connections if opened < connections else 0.1 if window.is_open else 1
        for fd, _ in epoll.poll(soon):
            client = clients[fd]
            had = client.chunks
            alive = read(client)
            if client.chunks > had:
                now = time.monotonic()
                tally.chunks += client.chunks - had
                if had:
                    tally.gap = max(tally.gap, now - client.last)
                else:
                    tally.latencies.append(now - client.began)
                client.last = now
            if client.complete or not alive:
                tally.done += client.good and client.done
                tally.failed += not (client.good and client.done)
                refused += not client.chunks
                clients.pop(fd).sock.close()
        if not window.watch:
            continue
        if not window.began and len(tally.latencies) + refused == connections:
            window.begin(tally.chunks)
        elif window.is_open and time.monotonic() - window.began >= window.seconds:
            window.end(tally.chunks, len(clients))
            if leave:
                tally.done += len(clients)
                break
    report = tally.report(time.monotonic() - began)
    report |= {"began": len(tally.latencies), "window": window.found}
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["whole", "streams"])
    parser.add_argument("--port", type=int, nargs="+", required=True)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of whole requests")
    parser.add_argument("--chunks", type=int, default=100, help="of each stream")
    parser.add_argument("--pace", type=int, default=20, help="chunks a second of each stream")
    parser.add_argument("--over", type=float, default=1.0, help="seconds in which streams begin")
    parser.add_argument("--key", default="", help="API key to show")
    parser.add_argument(
        "--watch", type=int, nargs="*", default=[], help="whose CPU and memory count"
    )
    parser.add_argument("--window", type=float, default=3.0, help="seconds of streams watched")
    parser.add_argument("--leave", action="store_true", help="hang up after the window")
    parser.add_argument("--within", type=float, default=60.0, help="of all streams, then give up")
    a = parser.parse_args()
    raw = request(streamed=a.what == "streams", chunks=a.chunks, pace=a.pace, key=a.key)
    if a.what == "whole":
        report = whole(a.port, a.connections, a.seconds, raw, a.watch)
    else:
        window = Window(a.watch, a.window)
        report = streams(
            a.port, a.connections, raw,
            over=a.over, window=window, leave=a.leave, within=a.within,
        )  # fmt: skip
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
