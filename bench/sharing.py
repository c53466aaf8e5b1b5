"""Several workers on one address: who gets the connections, and what is lost when one is killed.

``python -m bench.sharing`` compares the ways in which the kernel lets processes share a port, with
a small Trio server in each of four processes, and prints a table.  Nothing of the gateway but
``io.crowd`` is in it, so the figures are about the sockets.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import trio

from bench.processes import cpu_seconds
from citadel_gateway.io.crowd import Crowd, Turns

_BUSY = 0.0003  # seconds of CPU that an answer costs
_ACCEPTS_AT_MOST = 64


@attrs.frozen
class Way:
    """How the workers share."""

    name: str
    reuse_port: bool = False
    at_once: int = _ACCEPTS_AT_MOST
    takes_turns: bool = False


WAYS = (
    Way("SO_REUSEPORT", reuse_port=True),
    Way("inherited, all that wait at once"),
    Way("inherited, one at a time", at_once=1),
    Way("inherited, one at a time, fewest connections first", at_once=1, takes_turns=True),
)


async def _serve(listener: socket.socket, name: bytes, way: Way, turns: Turns) -> None:
    held = 0

    async def talk(sock: socket.socket) -> None:
        nonlocal held
        held += 1
        turns.note(held)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        try:
            while await stream.receive_some(100):
                until = time.perf_counter() + _BUSY
                while time.perf_counter() < until:
                    pass
                await stream.send_all(name)
        except trio.BrokenResourceError:
            pass
        finally:
            held -= 1
            turns.note(held)
            await trio.aclose_forcefully(stream)

    turns.note(0)
    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listener)
            if way.takes_turns:
                await turns.wait()
            for _ in range(way.at_once):
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    break
                sock.setblocking(False)
                nursery.start_soon(talk, sock)


def _listen(port: int, *, reuse_port: bool) -> socket.socket:
    sock = socket.create_server(("127.0.0.1", port), backlog=2048, reuse_port=reuse_port)
    sock.setblocking(False)
    return sock


@contextmanager
def _workers(way: Way, count: int) -> Iterator[tuple[int, list[int]]]:
    """Their port and their process numbers."""
    first = _listen(0, reuse_port=way.reuse_port)
    port = first.getsockname()[1]
    crowd = Crowd.make()
    pids: list[int] = []
    for number in range(count):
        listener = first
        if way.reuse_port and number:
            listener = _listen(port, reuse_port=True)
        if pid := os.fork():
            pids.append(pid)
            if listener is not first:
                listener.close()
            continue
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if way.reuse_port and number:
            first.close()
        trio.run(_serve, listener, b"%d" % number, way, Turns(crowd, number))
    first.close()
    time.sleep(0.5)
    try:
        yield port, pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _share(counts: Counter[bytes], workers: int) -> str:
    """The largest and the smallest share, in units of a fair one."""
    found = [counts[b"%d" % number] for number in range(workers)]
    fair = sum(found) / workers
    return f"{max(found) / fair:.2f} / {min(found) / fair:.2f}"


async def _kept(port: int, clients: int, asks: int, apart: float) -> tuple[Counter[bytes], ...]:
    """Clients that come one after the other, and stay: connections and requests by worker."""
    connections: Counter[bytes] = Counter()
    requests: Counter[bytes] = Counter()

    async def client(number: int) -> None:
        await trio.sleep(number * apart)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            name = b""
            for _ in range(asks):
                await stream.send_all(b"?")
                name = bytes(await stream.receive_some(10))
                requests[name] += 1
                await trio.sleep(0.002)
            connections[name] += 1

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(client, number)
    return connections, requests


async def _fresh(port: int, clients: int, asks: int) -> list[float]:
    """A connection for each request: how long each took."""
    took: list[float] = []

    async def client() -> None:
        for _ in range(asks):
            began = time.perf_counter()
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"?")
                await stream.receive_some(10)
            took.append(time.perf_counter() - began)

    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(client)
    return took


def _lost(port: int, pids: list[int]) -> tuple[int, int]:
    """Connect while no worker accepts, kill one, let the others go on: lost, of all."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    waiting = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(100)]
    for sock in waiting:
        sock.sendall(b"?")
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.2)
    for pid in pids[1:]:
        os.kill(pid, signal.SIGCONT)
    lost = 0
    for sock in waiting:
        sock.settimeout(3)
        try:
            lost += not sock.recv(10)
        except OSError:
            lost += 1
        sock.close()
    return lost, len(waiting)


def measure(way: Way, workers: int, rounds: int) -> list[str]:
    def median(found: list[tuple[float, float]]) -> str:
        return " / ".join(f"{statistics.median(part):.2f}" for part in zip(*found, strict=True))

    def shares(run: Callable[[int], tuple[Counter[bytes], ...]]) -> tuple[str, str]:
        found: list[list[tuple[float, float]]] = [[], []]
        for _ in range(rounds):
            with _workers(way, workers) as (port, _):
                for place, counts in enumerate(run(port)):
                    most, least = _share(counts, workers).split(" / ")
                    found[place].append((float(most), float(least)))
        return median(found[0]), median(found[1])

    slow, slow_requests = shares(lambda port: trio.run(_kept, port, 32, 100, 0.02))
    burst, _ = shares(lambda port: trio.run(_kept, port, 32, 100, 0.0))
    with _workers(way, workers) as (port, pids):
        before = sum(map(cpu_seconds, pids))
        took = trio.run(_fresh, port, 8, 250)
        cpu = (sum(map(cpu_seconds, pids)) - before) / len(took) * 1e6
        lost, of = _lost(port, pids)
    p99 = statistics.quantiles(took, n=100)[98] * 1000
    return [way.name, slow, slow_requests, burst, f"{cpu:.0f}", f"{p99:.1f}", f"{lost} of {of}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.sharing")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(
        "| Way | kept connections: most / least | their requests | kept, all at once "
        "| CPU, us for each fresh connection | p99, ms | lost in the queue of a killed worker |"
    )
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        print("| " + " | ".join(measure(way, asked.workers, asked.rounds)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
