"""How soon an engine sees that a client has left, and whether anything is left behind.

Clients, gateway and engine are separate processes; the engine here is this process, and so are
the clients, so that one clock times both ends: a client's close, and the end of stream that its
request's connection to the engine sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from bench.engine import CHUNK, HEAD, chunked
from bench.load import STREAM, WHOLE, encode


@attrs.define
class Watch:
    """When each request reached the engine, and when its connection ended there."""

    arrived: dict[str, trio.Event] = attrs.field(factory=dict)
    gone: dict[str, float] = attrs.field(factory=dict)
    all_gone: trio.Event = attrs.field(factory=trio.Event)
    expected: int = 0

    def expect(self, request_id: str) -> trio.Event:
        return self.arrived.setdefault(request_id, trio.Event())

    def left(self, request_id: str) -> None:
        self.gone[request_id] = trio.current_time()
        if len(self.gone) >= self.expected:
            self.all_gone.set()


async def engine(watch: Watch, stream: trio.SocketStream) -> None:
    """Streams a chunk every 50 ms; whole requests are never answered."""
    data = b""
    while b"\r\n\r\n" not in data or not data.rstrip().endswith(b"}"):
        piece = await stream.receive_some(65536)
        if not piece:
            return
        data += bytes(piece)
        if data.startswith(b"GET"):
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            data = b""
    request_id = data.split(b"x-request-id: ")[1].split(b"\r\n")[0].decode()
    watch.expect(request_id).set()
    try:
        async with trio.open_nursery() as nursery:
            if b'"stream": true' in data or b'"stream":true' in data:
                nursery.start_soon(_trickle, stream)
            while await stream.receive_some(65536):
                pass
            nursery.cancel_scope.cancel()
    except* trio.BrokenResourceError:
        pass
    watch.left(request_id)


async def _trickle(stream: trio.SocketStream) -> None:
    await stream.send_all(HEAD)
    while True:
        await stream.send_all(chunked(CHUNK))
        await trio.sleep(0.05)


async def leaver(
    port: int,
    name: str,
    streamed: bool,
    watch: Watch,
    leave: trio.Event,
    ready: trio.Event,
    waiting: list[str],
    left: dict[str, float],
) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(encode(STREAM if streamed else WHOLE, name))
    await watch.expect(name).wait()
    if streamed:
        await stream.receive_some(65536)
    waiting.remove(name)
    if not waiting:
        ready.set()
    await leave.wait()
    left[name] = trio.current_time()
    await stream.aclose()


async def round_of(port: int, streams: int, wholes: int, watch: Watch, tag: str) -> list[float]:
    """All clients wait for their answers, then all leave at the same moment."""
    names = [f"{tag}-s{i}" for i in range(streams)] + [f"{tag}-w{i}" for i in range(wholes)]
    waiting, left = list(names), dict[str, float]()
    ready, leave = trio.Event(), trio.Event()
    watch.expected = len(watch.gone) + len(names)
    watch.all_gone = trio.Event()
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(leaver, port, name, "-s" in name, watch, leave, ready, waiting, left)
        await ready.wait()
        leave.set()
    with trio.fail_after(10):
        await watch.all_gone.wait()
    return [watch.gone[name] - left[name] for name in names]


def open_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def measure(gateway: int, engine_port: int, pid: int, rounds: int) -> dict[str, Any]:
    watch, delays = Watch(), list[float]()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, partial(engine, watch), engine_port))
        sys.stderr.write("engine listens\n")
        await trio.to_thread.run_sync(sys.stdin.readline)  # until the gateway is ready
        await trio.sleep(4)  # idle connections of the first probes expire
        before = open_descriptors(pid)
        for i in range(rounds):
            delays += await round_of(gateway, 60, 60, watch, f"r{i}")
        await round_of(gateway, 600, 0, watch, "many")
        await trio.sleep(4)
        after = open_descriptors(pid)
        nursery.cancel_scope.cancel()
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
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    json.dump(trio.run(measure, a.port, a.engine_port, a.pid, a.rounds), sys.stdout)


if __name__ == "__main__":
    main()
