"""How soon an engine sees that a client has left, and whether anything is left behind.

Clients, gateway and engine are three processes.  Clients and engine use bare sockets and one
system-wide monotonic clock: a client's time is taken just before it closes its socket, the
engine's when it sees the end of the request's connection.  A driver on an event loop would
measure mostly itself: 120 of its own tasks have to wake up at the same moment.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import time
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.engine import CHUNK, EVENTS, chunked
from bench.load import request

HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Engine:
    """Starts streams and lets whole requests wait; notes when each connection ends."""

    def __init__(self, port: int, news: Connection) -> None:
        self.news = news
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=2048)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.read: dict[socket.socket, bytes] = {}
        self.serving: dict[socket.socket, str] = {}
        self.streams: set[socket.socket] = set()

    def run(self) -> None:
        """Until the other end of the pipe closes.  Streams get a chunk every 50 ms."""
        self.news.send("listening")
        due = time.monotonic()
        while not self.news.poll():
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self.listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._receive(key.fileobj)
            if time.monotonic() >= due:
                self._trickle()
                due = time.monotonic() + 0.05

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.read[sock] = b""
        self.selector.register(sock, selectors.EVENT_READ)

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._end(sock)
            return
        self.read[sock] += data
        data = self.read[sock]
        if data.startswith(b"GET"):
            sock.sendall(HEALTHY)
        elif b"\r\n\r\n" in data and data.endswith(b"}"):
            name = data.split(b"x-request-id: ")[1].split(b"\r\n")[0].decode()
            self.serving[sock] = name
            if b'"stream": true' in data or b'"stream":true' in data:
                sock.sendall(EVENTS)
                self.streams.add(sock)
            self.news.send(("arrived", name, 0.0))
        else:
            return
        self.read[sock] = b""

    def _end(self, sock: socket.socket) -> None:
        now = time.monotonic()
        self.selector.unregister(sock)
        self.streams.discard(sock)
        if name := self.serving.pop(sock, None):
            self.news.send(("gone", name, now))
        del self.read[sock]
        sock.close()

    def _trickle(self) -> None:
        piece = chunked(CHUNK)
        for sock in self.streams:
            try:
                sock.sendall(piece)
            except OSError:
                continue  # its end is read, above


def run_engine(port: int, news: Connection) -> None:
    Engine(port, news).run()


def round_of(
    port: int, key: str, streams: int, wholes: int, news: Connection, tag: str
) -> list[float]:
    """All clients wait for their answers, then all leave in the same moment; delays in seconds."""
    names = [f"{tag}-s{i}" for i in range(streams)] + [f"{tag}-w{i}" for i in range(wholes)]
    clients = {}
    for name in names:
        sock = clients[name] = socket.create_connection(("127.0.0.1", port))
        sock.sendall(request(streamed="-s" in name, key=key, request_id=name))
    wait_for(news, "arrived", names)
    for name in names[:streams]:
        clients[name].recv(65536)
    left = {}
    for name, sock in clients.items():
        left[name] = time.monotonic()
        sock.close()
    gone = wait_for(news, "gone", names)
    return [gone[name] - left[name] for name in names]


def wait_for(news: Connection, event: str, names: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    deadline = time.monotonic() + 15
    while len(found) < len(names):
        if not news.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"{len(names) - len(found)} requests have not {event}")
        kind, name, when = news.recv()
        if kind == event:
            found[name] = when
    return found


def open_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def measure(gateway: int, key: str, engine_port: int, pid: int, rounds: int) -> dict[str, Any]:
    news, theirs = Pipe()
    engine = Process(target=run_engine, args=(engine_port, theirs), daemon=True)
    engine.start()
    assert news.recv() == "listening"
    sys.stderr.write("the engine listens\n")
    sys.stdin.readline()  # until the gateway is ready
    time.sleep(4)  # connections of its first probes expire
    before = open_descriptors(pid)
    delays: list[float] = []
    for i in range(rounds):
        delays += round_of(gateway, key, 60, 60, news, f"r{i}")
        time.sleep(0.5)
    round_of(gateway, key, 600, 0, news, "many")
    time.sleep(4)
    after = open_descriptors(pid)
    news.send("stop")
    engine.join(5)
    delays.sort()
    return {
        "left": len(delays),
        "p50_ms": round(delays[len(delays) // 2] * 1000, 2),
        "p99_ms": round(delays[int(len(delays) * 0.99)] * 1000, 2),
        "max_ms": round(delays[-1] * 1000, 2),
        "descriptors_before": before,
        "descriptors_after": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--key", default="", help="API key to show")
    parser.add_argument("--rounds", type=int, default=10)
    a = parser.parse_args()
    json.dump(measure(a.port, a.key, a.engine_port, a.pid, a.rounds), sys.stdout)


if __name__ == "__main__":
    main()
