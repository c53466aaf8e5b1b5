"""Whether memory stays below its limit when large bodies and large answers come all at once.

    python -m bench.memory_flood       # a minute; prints a table, and what each phase found

The gateway may have 0.5 GiB.  Two hundred clients send 8 MiB each; then twelve ask for answers of
60 MiB each; small requests go on beside both, one at a time.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import attrs

from bench.load import encode
from bench.open_loop import quantiles
from bench.overload import wait_until_ready
from bench.processes import beside, free_ports, peak_mb, resident_mb, running

LIMIT_GB = 0.5
CONFIG = """\
service: {{host: 127.0.0.1, port: {port}, workers: 1}}
models:
  bench: {{endpoint: "http://127.0.0.1:{engine}", max_concurrent: 100}}
performance: {{memory_limit_gb: {limit}, rate_limiting_enabled: false}}
monitoring: {{prometheus_port: {metrics}}}
"""
_ANSWER = b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":'
_ANSWER += b'"assistant","content":"%s"},"finish_reason":"stop"}],"usage":{}}'


class Engine:
    """Takes a second for each request; ``seed`` says how many MiB the answer has."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)

    def run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as file, suppress(OSError, ValueError):
            while line := file.readline():
                length = 0
                while (field := file.readline()) != b"\r\n":
                    if field.lower().startswith(b"content-length:"):
                        length = int(field.partition(b":")[2])
                body = file.read(length)
                if line.startswith(b"GET"):
                    sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                size = json.loads(body).get("seed", 0) * 2**20
                time.sleep(0.5 if size or length > 2**20 else 0.0)
                answer = _ANSWER % (b"x" * size)
                head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                sock.sendall(head + b"content-length: %d\r\n\r\n" % len(answer) + answer)


@attrs.define(eq=False)
class Client:
    raw: memoryview
    sent: int = 0
    head: bytes = b""
    got: int = 0

    @property
    def status(self) -> str:
        words = self.head.split(b" ", 2)
        return words[1].decode() if len(words) > 1 else "none"


def flood(port: int, raw: bytes, clients: int) -> Counter[str]:
    """All *clients* at once; how they were answered."""
    selector, found = selectors.DefaultSelector(), Counter[str]()
    for _ in range(clients):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        selector.register(sock, both, Client(memoryview(raw)))
    end = time.monotonic() + 60
    while selector.get_map() and time.monotonic() < end:
        for key, events in selector.select(0.1):
            sock, client = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            try:
                if events & selectors.EVENT_WRITE:
                    client.sent += sock.send(client.raw[client.sent : client.sent + 262144])
                    if client.sent == len(client.raw):
                        selector.modify(sock, selectors.EVENT_READ, client)
                data = sock.recv(262144) if events & selectors.EVENT_READ else None
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data:
                client.head = client.head or data[:100]
                client.got += len(data)
                if data.endswith(b'"usage":{}}' if client.status == "200" else b"}"):
                    data = b""
            if data == b"":
                found[client.status] += 1
                selector.unregister(sock)
                sock.close()
    return found + Counter({"unanswered": len(selector.get_map())})


@attrs.define
class Beside:
    """Small requests, one after the other, and a look at the memory after each."""

    port: int
    pid: int
    answers: Counter[str] = attrs.field(factory=Counter)
    latencies_ms: list[float] = attrs.field(factory=list)
    memory_mb: float = 0.0
    _over: threading.Event = attrs.field(factory=threading.Event)

    def _ask(self) -> None:
        body = {"model": "bench", "messages": [{"role": "user", "content": "hi"}]}
        while not self._over.wait(0.02):
            self.memory_mb = max(self.memory_mb, resident_mb(self.pid))
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
                sock.sendall(encode(body))
                self.answers[sock.recv(65536).split(b" ")[1].decode()] += 1
            self.latencies_ms.append((time.monotonic() - began) * 1000)

    def going_on(self) -> AbstractContextManager[None]:
        return beside(self._ask, self._over)


def phase(port: int, pid: int, metrics: int, raw: bytes, clients: int, waves: int) -> Any:
    beside = Beside(port, pid)
    answers: Counter[str] = Counter()
    with beside.going_on():
        for _ in range(waves):
            answers += flood(port, raw, clients)
    time.sleep(7)  # the gateway gives back what it has freed
    after = Beside(port, pid)
    with after.going_on():
        time.sleep(1)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics") as answer:
        page = answer.read().decode().splitlines()
    found = {
        line.partition(" ")[0].removeprefix("citadel_gateway_"): float(line.rpartition(" ")[2])
        for line in page
        if line.startswith(("citadel_gateway_buffered_bytes ", "citadel_gateway_overload_"))
    }
    return {
        "answers": dict(answers),
        "memory_mb": beside.memory_mb,
        "beside": dict(beside.answers),
        "beside_ms": quantiles(beside.latencies_ms),
        "after": dict(after.answers),
        "after_mb": after.memory_mb,
        "metrics": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", type=int, help="be the engine, on this port")
    parser.add_argument("--waves", type=int, default=3)
    a = parser.parse_args()
    if a.engine:
        Engine(a.engine).run()
        return
    port, metrics, engine = free_ports(3, 22000)
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "gateway.yaml"), Path(folder, "gateway.log")
        file.write_text(CONFIG.format(port=port, engine=engine, metrics=metrics, limit=LIMIT_GB))
        serve = (sys.executable, "-m", "citadel_gateway", "serve", "--config", str(file))
        mine = (sys.executable, "-m", "bench.memory_flood", "--engine", str(engine))
        with running(mine), running(serve, log=log) as process:
            wait_until_ready(metrics)
            large = encode(
                {"model": "bench", "messages": [{"role": "user", "content": "x" * (8 * 10**6)}]}
            )
            asks = encode(
                {"model": "bench", "messages": [{"role": "user", "content": "?"}], "seed": 60}
            )
            found = {
                "limit_mb": LIMIT_GB * 1024,
                "bodies": phase(port, process.pid, metrics, large, 200, a.waves),
                "answers": phase(port, process.pid, metrics, asks, 12, a.waves),
                "peak_mb": peak_mb(process.pid),
                "levels": [
                    f"{line['resource']} {line['state']} {line['used'] / line['limit']:.0%}"
                    for line in map(json.loads, log.read_bytes().splitlines())
                    if line.get("event") == "overload"
                ],
                "crashes": log.read_bytes().count(b'"crash"'),
            }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
