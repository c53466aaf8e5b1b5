"""Load drivers: closed-loop whole requests, concurrent streams, and clients that leave.

Each prints one JSON object.  Raw sockets and llhttp, so that the driver is cheaper than what it
drives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from typing import Any

import attrs
import httptools
import trio

WHOLE = {
    "model": "bench",
    "messages": [{"role": "user", "content": "Say hello to the world in one sentence."}],
    "max_tokens": 40,
}
STREAM = {**WHOLE, "stream": True}


def encode(body: dict[str, Any], request_id: str = "") -> bytes:
    data = json.dumps(body).encode()
    extra = f"x-request-id: {request_id}\r\n" if request_id else ""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"{extra}content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@attrs.define
class Reply:
    """What llhttp tells about the answer that is being read."""

    body: bytes = b""
    complete: bool = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


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
            found["p50_ms"] = round(statistics.median(ordered) * 1000, 3)
            found["p99_ms"] = round(ordered[int(len(ordered) * 0.99)] * 1000, 3)
        return found


async def client(port: int, raw: bytes, until: float, tally: Tally, once: bool = False) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    reply = Reply()
    parser = httptools.HttpResponseParser(reply)
    async with stream:
        while trio.current_time() < until:
            began = trio.current_time()
            reply.body, reply.complete = b"", False
            await stream.send_all(raw)
            while not reply.complete:
                data = await stream.receive_some(65536)
                if not data:
                    tally.failed += 1
                    return
                parser.feed_data(bytes(data))
            good = parser.get_status_code() == 200
            tally.done += good
            tally.failed += not good
            tally.chunks += reply.body.count(b"data: {")
            tally.latencies.append(trio.current_time() - began)
            if once:
                return


async def run(port: int, connections: int, seconds: float, streamed: bool) -> dict[str, Any]:
    tally, began = Tally(), trio.current_time()
    raw = encode(STREAM if streamed else WHOLE)
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(partial(client, port, raw, began + seconds, tally, once=streamed))
    return tally.report(trio.current_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["whole", "streams"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    a = parser.parse_args()
    began = time.time()
    report = trio.run(run, a.port, a.connections, a.seconds, a.what == "streams")
    report["wall"] = round(time.time() - began, 3)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
