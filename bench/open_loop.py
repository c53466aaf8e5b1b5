"""Load driver in an open loop: streams are asked for at a given rate, whatever becomes of them.

Requests come at random (Poisson) moments that are fixed beforehand, and latencies count from those
moments: a driver that is late, or that waits for an answer before it sends the next request, would
leave out the very requests that have to wait.  How late it was itself is in the report, too.

One bare epoll loop that nothing blocks, connecting included.  Clients keep their connections, and
send head and body in two pieces, as the usual client libraries do.  Prints one JSON object.

One process stands for thousands of clients, and when it reads late, no client has waited.  So the
kernel's own time stamps tell when an answer had come; how late the driver sent is told apart.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import struct
import sys
import time
from collections import Counter
from typing import Any

import attrs
import httptools

from bench.load import encode

_SO_TIMESTAMPNS = 35
_STAMP = struct.Struct("@qq")
_STAMP_SPACE = socket.CMSG_SPACE(_STAMP.size)
_SETTLES = 4.0  # seconds at the beginning that do not count: by then streams have begun to end


@attrs.define(eq=False)
class Ask:
    """One request; moments are seconds of the driver's clock.

    :param due: when it was to be sent.
    :param arrived: when the last of its answer was in the client's socket.
    """

    due: float
    sent: float
    first: float | None = None
    arrived: float = 0.0
    ended: float = 0.0
    status: int = 0
    code: str = ""
    whole: bool = False


@attrs.define(eq=False)
class Client:
    """One connection."""

    sock: socket.socket
    ask: Ask | None = None
    body: bytes = b""
    complete: bool = False
    closing: bool = False
    is_connected: bool = False
    parser: httptools.HttpResponseParser = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        if self.parser.get_status_code() != 200:
            self.body += body
        elif self.ask is not None:
            if self.ask.first is None and b'"content":"token "' in body:
                self.ask.first = time.monotonic()
            self.ask.whole = self.ask.whole or b"[DONE]" in body

    def on_message_complete(self) -> None:
        self.complete = True
        self.closing = not self.parser.should_keep_alive()


@attrs.define
class Driver:
    """:param patience: seconds for which a client waits for its first token."""

    port: int
    rate: float
    seconds: float
    patience: float
    raw: bytes
    seed: int
    asks: list[Ask] = attrs.field(factory=list, init=False)
    connections: int = attrs.field(default=0, init=False)
    broken: int = attrs.field(default=0, init=False)
    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _clients: dict[int, Client] = attrs.field(factory=dict, init=False)
    _idle: dict[Client, None] = attrs.field(factory=dict, init=False)  # the last one is used first
    _waiting: int = attrs.field(default=0, init=False)

    def run(self) -> dict[str, Any]:
        chance = random.Random(self.seed)
        began = time.monotonic()
        due = began + chance.expovariate(self.rate)
        while True:
            now = time.monotonic()
            while due <= now and due < began + self.seconds:
                self._send(due)
                due += chance.expovariate(self.rate)
            over = now >= began + self.seconds
            if over and (not self._waiting or now >= began + self.seconds + self.patience + 10):
                break
            wait = 0.1 if over else max(0.0, due - time.monotonic())
            for fd, events in self._epoll.poll(min(wait, 0.1)):
                client = self._clients[fd]
                if client.is_connected:
                    self._read(client)
                elif events & ~select.EPOLLOUT:
                    self._drop(client)
                else:
                    client.is_connected = True
                    self._epoll.modify(fd, select.EPOLLIN)
                    self._ask(client)
        return self._report(began)

    def _send(self, due: float) -> None:
        client = self._idle.popitem()[0] if self._idle else self._connect()
        client.ask = Ask(due, time.monotonic())
        self.asks.append(client.ask)
        self._waiting += 1
        if client.is_connected:
            self._ask(client)

    def _ask(self, client: Client) -> None:
        head, end, body = self.raw.partition(b"\r\n\r\n")
        try:
            client.sock.send(head + end)
            client.sock.send(body)
        except OSError:
            self._drop(client)

    def _connect(self) -> Client:
        """It is a client at once, and asks when the connection is there."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.connect_ex(("127.0.0.1", self.port))
        client = self._clients[sock.fileno()] = Client(sock)
        self._epoll.register(sock, select.EPOLLOUT)
        self.connections += 1
        return client

    def _read(self, client: Client) -> None:
        stamps: list[tuple[int, int, bytes]] = []
        try:
            data, stamps, _, _ = client.sock.recvmsg(262144, _STAMP_SPACE)
            client.parser.feed_data(data)
        except (OSError, httptools.HttpParserError):
            data = b""
        if not data:
            self._drop(client)
        elif client.complete:
            if client.ask is not None and stamps:
                seconds, nanoseconds = _STAMP.unpack(stamps[0][2])
                ago = time.time() - (seconds + nanoseconds / 1e9)
                client.ask.arrived = time.monotonic() - ago
            self._end(client)

    def _end(self, client: Client) -> None:
        ask, client.ask = client.ask, None
        if ask is not None:
            self._waiting -= 1
            ask.ended = time.monotonic()
            ask.status = client.parser.get_status_code()
            if ask.status != 200:
                ask.code = json.loads(client.body)["error"]["code"]
        client.body, client.complete = b"", False
        if client.closing:
            self._drop(client)
        else:
            self._idle[client] = None

    def _drop(self, client: Client) -> None:
        if client.ask is not None:
            self.broken += 1
            self._waiting -= 1
        self._idle.pop(client, None)
        del self._clients[client.sock.fileno()]
        client.sock.close()

    def _report(self, began: float) -> dict[str, Any]:
        since, until = began + _SETTLES, began + self.seconds
        asked = [ask for ask in self.asks if since <= ask.due < until]
        good = [
            ask
            for ask in self.asks
            if ask.status == 200
            and ask.whole
            and ask.first is not None
            and ask.first - ask.due <= self.patience
        ]
        refused = [a for a in asked if a.status in {429, 503}]
        return {
            "offered": len(asked) / (until - since),
            "goodput": sum(since <= ask.ended < until for ask in good) / (until - since),
            "first_token_s": quantiles([a.first - a.due for a in good if a.first and a in asked]),
            "refused_at_once_ms": quantiles(
                [(a.ended - a.due) * 1000 for a in refused if a.ended - a.due < 1.0]
            ),
            "refused_at_once_on_the_wire_ms": quantiles(
                [
                    (a.arrived - a.sent) * 1000
                    for a in refused
                    if a.ended - a.due < 1.0 and a.arrived
                ]
            ),
            "refused_late": sum(a.ended - a.due >= 1.0 for a in refused),
            "answers": dict(Counter(f"{a.status} {a.code}".strip() for a in asked)),
            "broken": self.broken,
            "connections": self.connections,
            "driver_late_ms": quantiles([(a.sent - a.due) * 1000 for a in asked]),
        }


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "p50": round(ordered[len(ordered) // 2], 3),
        "p99": round(ordered[int(len(ordered) * 0.99)], 3),
        "max": round(ordered[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--patience", type=float, default=5.0, help="for the first token")
    parser.add_argument("--chunks", type=int, default=20, help="of each stream")
    parser.add_argument("--pace", type=int, default=10, help="chunks a second of each stream")
    parser.add_argument("--prompt", type=int, default=0, help="at least so many bytes of it")
    parser.add_argument("--key", default="")
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    prompt = "Say hello to the world in one sentence. ".ljust(a.prompt, ".")
    body = {
        "model": "bench", "messages": [{"role": "user", "content": prompt}],
        "stream": True, "max_tokens": a.chunks, "seed": a.pace,
    }  # fmt: skip
    raw = encode(body, key=a.key)
    driver = Driver(
        port=a.port, rate=a.rate, seconds=a.seconds, patience=a.patience, raw=raw, seed=a.seed
    )
    json.dump(driver.run(), sys.stdout)


if __name__ == "__main__":
    main()
