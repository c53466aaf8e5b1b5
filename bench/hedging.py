"""What hedging does for the slowest first tokens, and what it costs the engines.

Four engines serve one model over sockets; first tokens take 60 to 120 ms.  One of the engines is
sick: of every twenty requests that it gets, one waits two seconds.  The same arrivals come
twice, to a gateway that hedges and to one that does not: ``python -m bench.hedging``.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path

import attrs
import trio

from bench.engine import CHUNK, END, EVENTS, chunked
from bench.load import request
from bench.processes import free_ports, running

_FIRST_TOKEN = (0.06, 0.12)
_SICK = 2.0
_TOKENS, _GAP = 8, 0.02
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
_CONFIG = """
service: {{host: 127.0.0.1, port: {port}, workers: 1}}
performance: {{rate_limiting_enabled: false, max_concurrent_requests: 1000}}
monitoring: {{prometheus_port: null, access_log: false}}
models:
  bench:
    hedge: {hedge}
    endpoints: [{endpoints}]
"""


@attrs.define
class Work:
    """What the engines did."""

    asked: int = 0
    tokens: int = 0


@attrs.define
class Engine:
    work: Work
    rng: random.Random
    is_sick: bool

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            while data := await stream.receive_some():
                if data.startswith(b"GET"):
                    await stream.send_all(_HEALTHY)
                    continue
                while not data.endswith(b"}"):
                    data += await stream.receive_some()
                self.work.asked += 1
                if not await self._answer_or_leave(stream):
                    return
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the gateway has hung up, which is its right

    async def _answer_or_leave(self, stream: trio.SocketStream) -> bool:
        has_answered = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await stream.receive_some()  # it says nothing more, so it has hung up
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await self._answer(stream)
            has_answered = True
            nursery.cancel_scope.cancel()
        return has_answered

    async def _answer(self, stream: trio.SocketStream) -> None:
        wait = self.rng.uniform(*_FIRST_TOKEN)
        if self.is_sick and self.work.asked % 20 == 0:
            wait = _SICK
        await stream.send_all(EVENTS)
        await trio.sleep(wait)
        for _ in range(_TOKENS):
            self.work.tokens += 1
            await stream.send_all(chunked(CHUNK))
            await trio.sleep(_GAP)
        await stream.send_all(END)


def run_engines(ports: list[int], news: Connection) -> None:
    """Until something comes through the pipe; then tells what they did."""

    async def main() -> None:
        works = [Work() for _ in ports]
        async with trio.open_nursery() as nursery:
            for place, (port, work) in enumerate(zip(ports, works, strict=True)):
                engine = Engine(work, random.Random(place), is_sick=place == 0)
                await nursery.start(partial(trio.serve_tcp, engine.serve, port, host="127.0.0.1"))
            news.send("listening")
            await trio.to_thread.run_sync(news.recv)
            nursery.cancel_scope.cancel()
        news.send(Work(sum(w.asked for w in works), sum(w.tokens for w in works)))

    trio.run(main)


@contextmanager
def engines(ports: list[int]) -> Iterator[Connection]:
    news, theirs = Pipe()
    process = Process(target=run_engines, args=(ports, theirs), daemon=True)
    process.start()
    assert news.recv() == "listening"
    try:
        yield news
    finally:
        process.join(5)


async def read_until(mark: bytes, stream: trio.SocketStream) -> bytes:
    data = b""
    while mark not in data:
        if not (more := await stream.receive_some()):
            raise RuntimeError(f"the gateway ended with {data[-300:]!r}")
        data += more
    return data


async def drive(port: int, rate: float, seconds: float) -> list[float]:
    """Poisson arrivals; seconds from each request to its first token."""
    rng, found = random.Random(7), list[float]()

    async def ask() -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            began = trio.current_time()
            await stream.send_all(request(streamed=True, key="", request_id=""))
            data = await read_until(b"token", stream)
            found.append(trio.current_time() - began)
            if b"[DONE]" not in data:
                await read_until(b"[DONE]", stream)

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + seconds + 10
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            nursery.start_soon(ask)
            await trio.sleep(rng.expovariate(rate))
    return sorted(found)


def wait_until_ready(port: int) -> None:
    for _ in range(100):
        with suppress(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1).close()
            return
        time.sleep(0.1)
    raise TimeoutError("the gateway does not come up")


def measure(*, hedge: bool, rate: float, seconds: float) -> tuple[list[float], Work]:
    port, *ports = free_ports(5)
    endpoints = ", ".join(f"{{url: http://127.0.0.1:{each}}}" for each in ports)
    with tempfile.TemporaryDirectory() as folder, engines(ports) as news:
        file = Path(folder, "gateway.yaml")
        text = _CONFIG.format(port=port, hedge=str(hedge).lower(), endpoints=endpoints)
        file.write_text(text, "utf-8")
        command = (sys.executable, "-m", "citadel_gateway", "serve", "--config", str(file))
        with running(command):
            wait_until_ready(port)
            found = trio.run(drive, port, rate, seconds)
        news.send("stop")
        return found, news.recv()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60, help="for each of the two")
    asked = parser.parse_args()
    say("hedge | requests | p50 | p95 | p99 | max first token | sent to engines | tokens")
    for hedge in (False, True):
        found, work = measure(hedge=hedge, rate=asked.rate, seconds=asked.seconds)
        p50, p95, p99 = (found[int(len(found) * share)] * 1000 for share in (0.5, 0.95, 0.99))
        say(
            f"{'on' if hedge else 'off'} | {len(found)} | {p50:.0f} ms | {p95:.0f} ms | "
            f"{p99:.0f} ms | {found[-1] * 1000:.0f} ms | "
            f"{work.asked} ({work.asked / len(found) - 1:+.1%}) | "
            f"{work.tokens} ({work.tokens / len(found) / _TOKENS - 1:+.1%})"
        )


def say(line: str) -> None:
    print(line, flush=True)  # a program's output


if __name__ == "__main__":
    main()
