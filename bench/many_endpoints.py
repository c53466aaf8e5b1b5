"""What a request's place and the metrics page cost with four endpoints and with a thousand.

Pure CPU time of this process, no network: ``python -m bench.many_endpoints``.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import cycle

import trio

from citadel_gateway.app.group import Group
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.config.loader import parse
from citadel_gateway.config.values import Algorithm
from citadel_gateway.io.metrics import Levels, Metrics
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.waitroom import Ticket, Waitroom
from citadel_gateway.wire.openai_request import Kind, parse_request

ASK = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
SIZES = (4, 1000)
NOBODY: frozenset[Endpoint] = frozenset()


def make_group(algorithm: str, size: int) -> Group:
    endpoints = [{"url": f"http://engine-{i}", "weight": 1 + i % 5} for i in range(size)]
    config = parse(
        {"models": {"m": {"endpoints": endpoints}}, "load_balancer": {"algorithm": algorithm}}
    )
    balancer = LoadBalancer(config, rng=random.Random(1))
    for upstream in balancer.upstreams:
        upstream.endpoint.probed(None, 0.0)
        upstream.endpoint.latency.observe(random.random(), 0.0)
    return balancer.plan(parse_request(Kind.CHAT, ASK)).groups[0]


def place_cost(group: Group) -> float:
    """Microseconds of a request's way in and out, with 64 others under way."""
    room, held = Waitroom(seats=10**6, room=100), deque[Ticket]()
    draw = random.Random(1).getrandbits
    keys = cycle([draw(64) for _ in range(1000)])  # of as many sessions

    def one_request() -> None:
        group.is_any_left(NOBODY, 1.0)
        ticket = Ticket("m", (group, NOBODY), partial(group.choose, NOBODY, key=next(keys)))
        room.enter(ticket, 1.0)
        held.append(ticket)
        if len(held) > 64:
            room.leave(held.popleft(), Verdict.GOOD, 1.0)
            room.pump(1.0)

    return best_of(one_request)


def best_of(call: Callable[[], object], calls: int = 2000, rounds: int = 9) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, time.process_time() - began)
    return best / calls * 1e6


async def page_cost(size: int) -> tuple[float, float]:
    """Milliseconds of a page, and the longest that another task had to wait for its turn."""
    endpoints = tuple(make_group("round_robin", size).upstreams)
    metrics = Metrics(
        lambda: Levels(
            endpoints=endpoints, queue_depths={("m", "default"): 0}, queue_waits={}, in_flight=0,
            connections=0, tasks=0, upstream_connections=0, draining=False,
            log_lines_dropped=0, now=1.0,
        )
    )  # fmt: skip
    for endpoint in endpoints:
        metrics.attempted(endpoint, "ok")
        metrics.attempted(endpoint, "timeout_idle")
    waits = []

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await trio.lowlevel.checkpoint()
            waits.append(time.perf_counter() - began)

    await metrics.render()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(0.01)
        waits.clear()
        began = time.perf_counter()
        await metrics.render()
        took = time.perf_counter() - began
        await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    return took * 1e3, max(waits) * 1e3


def main() -> None:
    print(f"{'a place, in and out, us':24}" + "".join(f"{size:>8}" for size in SIZES))
    for algorithm in Algorithm:
        costs = [place_cost(make_group(algorithm.value, size)) for size in SIZES]
        print(f"{algorithm.value:24}" + "".join(f"{cost:8.1f}" for cost in costs))
    for size in SIZES:
        took, wait = trio.run(page_cost, size)
        print(f"/metrics, {size} endpoints: {took:.1f} ms, others waited {wait:.2f} ms at most")


if __name__ == "__main__":
    main()
