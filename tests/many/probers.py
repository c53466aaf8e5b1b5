"""One prober of an endpoint, however many could be it."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import trio

from tests.many.fleet import Shape, owners, workers_of
from tests.many.report import Finding
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import ScriptedEngine
from tests.support.several import configuration, gateways

_EVERY = 0.5
_LEASE = 3.0  # the default


async def moves(folder: Path, redis: RedisServer, shape: Shape, seconds: float) -> list[Finding]:
    """Count probes, kill who sends them, and see when somebody else does."""
    redis.command("FLUSHALL")
    engine = ScriptedEngine()
    peers: dict[int, int] = {}  # the other end's port, by number of the connection

    async def serve(stream: trio.SocketStream) -> None:
        peers[engine.connections + 1] = stream.socket.getpeername()[1]
        await engine.serve(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        config = configuration(
            [listeners[0].socket.getsockname()[1]],
            {},
            service={"workers": shape.workers},
            load_balancer={"health_check_interval": _EVERY},
        )
        config["store"] = shape.store(redis.url, folder / "store")
        async with gateways(folder, shape.gateways, config) as several:
            await trio.sleep(1.0)
            start = len(engine.ledger)
            await trio.sleep(seconds)
            probes = engine.ledger[start:]
            senders = {entry.connection for entry in probes}
            holder = owners([peers[probes[-1].connection]], workers_of(several), of_peer=False)
            os.kill(next(iter(holder.values())), signal.SIGKILL)
            killed, start = trio.current_time(), len(engine.ledger)
            with trio.move_on_after(20.0):
                while len(engine.ledger) == start:  # noqa: ASYNC110  # that is another process
                    await trio.sleep(0.01)
            moved = trio.current_time() - killed
            await trio.sleep(1.0)
            start = len(engine.ledger)
            await trio.sleep(seconds)
            later = {entry.connection for entry in engine.ledger[start:]}
        nursery.cancel_scope.cancel()
    due = seconds / _EVERY
    found = (
        f"{len(probes)} where {due:.0f} are due, from {len(senders)}; after kill -9 of the prober "
        f"the next one after {moved:.1f} s, then from {len(later)}"
    )
    kept = (
        0.8 * due - 1 <= len(probes) <= 1.2 * due + 1
        and len(senders) == len(later) == 1
        and senders != later
        and moved <= _LEASE + 2 * _EVERY
    )
    promise = f"one prober; another one within lease and interval ({_LEASE:g} and {_EVERY:g} s)"
    return [Finding(str(shape), promise, found, kept)]
