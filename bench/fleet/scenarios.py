"""What is measured, one function each; the same seed gives the same figures."""

from __future__ import annotations

import random
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from bench.fleet.load import Audit, Window, arrive, whole
from bench.fleet.world import MODEL, Fleet, Gateway, open_fleet
from citadel_gateway.policy.circuit_breaker import State, Verdict

Figures = dict[str, Any]


def configuration(
    rate: float = 1000.0,
    burst: int | None = None,
    cap: int = 100_000,
    endpoints: int = 1,
    seats: int = 1_000_000,
    **performance: Any,
) -> dict[str, Any]:
    """*endpoints* that may have *cap* requests each, and one rate limit over all."""
    return {
        "models": {
            MODEL: {
                "endpoints": [{"url": f"http://engine-{i}:80"} for i in range(endpoints)],
                "max_concurrent": cap,
            }
        },
        "performance": {
            "rate_limit_rps": rate,
            "rate_limit_burst": round(rate) if burst is None else burst,
            "max_concurrent_requests": seats,
            "request_timeout_seconds": 300,
            **performance,
        },
        "load_balancer": {"slow_start": 0, "queue_timeout": 300, "queue_size": 100_000},
        "monitoring": {"access_log": False},
    }


def calls_since(fleet: Fleet, before: Figures, seconds: float) -> Figures:
    """Of the store, a second."""
    now = counted(fleet)
    return {name: round((now[name] - before[name]) / seconds, 2) for name in now}


def counted(fleet: Fleet) -> Figures:
    server = fleet.server
    calls = {name: server.calls[name] for name in ("take", "meet", "report")}
    return {**calls, "takes": server.takes, "bytes": server.sent}


def limited(audit: Audit) -> Callable[[Gateway], Awaitable[None]]:
    async def ask(gateway: Gateway) -> None:
        window = audit.asked()
        if await gateway.is_let_in("198.51.100.7"):
            audit.admitted(window)

    return ask


def accuracy(windows: list[Window]) -> Figures:
    off, all_of_it = [window.off for window in windows], whole(windows)
    return {
        "windows": len(windows),
        "asked": all_of_it.asked,
        "admitted": all_of_it.admitted,
        "exact": all_of_it.exact,
        "off_percent": round(all_of_it.off, 2),
        "most_over_percent": round(max(off), 2),
        "most_under_percent": round(min(off), 2),
    }


async def limits(
    count: int, rate: float = 1000.0, offered: float = 2.0, seconds: int = 20, seed: int = 1
) -> Figures:
    """One rate limit over all gateways, and *offered* times as many requests as it lets in."""
    rng = random.Random(seed)
    async with open_fleet(configuration(rate), count, seed) as fleet:
        audit, before = Audit(rate, round(rate)), counted(fleet)
        await arrive(fleet, offered * rate, seconds, rng, limited(audit))
        calls = calls_since(fleet, before, seconds)
        await trio.sleep(0.5)
        windows = audit.between(1, seconds)  # the first one has the burst in it
        return {
            "gateways": count,
            "rate": rate,
            "offered": offered * rate,
            **accuracy(windows),
            "excess": round(audit.excess, 2),
            "calls_per_s": calls,
        }


async def away(
    count: int,
    rate: float = 1000.0,
    burst: int | None = None,
    offered: float = 2.0,
    seed: int = 1,
    how: str = "silent",
) -> Figures:
    """The store says nothing for 20 s, or forgets all, or half of the gateways lose their way."""
    rng = random.Random(seed)
    async with open_fleet(configuration(rate, burst), count, seed) as fleet:
        audit = Audit(rate, round(rate) if burst is None else burst)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrive, fleet, offered * rate, 50, rng, limited(audit))
            await trio.sleep(15)
            cut = fleet.gateways[::2] if how == "half" else []
            match how:
                case "silent":
                    fleet.server.is_away = True
                case "forgets":
                    fleet.server.memory.forget_all()
                case _:
                    for gateway in cut:
                        gateway.store.is_cut = True
            await trio.sleep(10)
            alone = sum(gateway.membership.is_alone for gateway in fleet.gateways)
            await trio.sleep(10)
            fleet.server.is_away = False
            for gateway in cut:
                gateway.store.is_cut = False
        return {
            "gateways": count,
            "rate": rate,
            "burst": audit.burst,
            "how": how,
            "alone": alone,
            "before": accuracy(audit.between(1, 15)),
            "first_5_s": accuracy(audit.between(15, 20)),
            "meanwhile": accuracy(audit.between(20, 35)),
            "next_5_s": accuracy(audit.between(35, 40)),
            "after": accuracy(audit.between(40, 50)),
            "excess": round(audit.excess, 2),
        }


async def caps(
    count: int,
    cap: int,
    demand: float,
    seconds: int = 60,
    service: float = 2.0,
    seed: int = 1,
    endpoints: int = 1,
) -> Figures:
    """*demand* times what the endpoints can work on; each request takes *service* on average."""
    rng, waits = random.Random(seed), list[float]()
    async with open_fleet(
        configuration(1e6, cap=cap, endpoints=endpoints), count, seed, cap * endpoints
    ) as fleet:

        async def ask(gateway: Gateway) -> None:
            began, takes = trio.current_time(), rng.expovariate(1 / service)
            if await gateway.work(takes):
                waits.append(trio.current_time() - began - takes)

        rate = demand * cap * endpoints / service
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrive, fleet, rate, seconds, rng, ask)
            await trio.sleep(5)
            fleet.engines.forget()
            before, seen = counted(fleet), len(waits)
            await trio.sleep(seconds - 6)
            calls = calls_since(fleet, before, seconds - 6)
            engines = fleet.engines
            engines.note(0, 0)
            return {
                "gateways": count,
                "cap": cap * endpoints,
                "demand": demand,
                "most": engines.most,
                "over_s": round(engines.over, 3),
                "unused_while_waiting_percent": round(
                    100 * engines.unused / engines.wanted if engines.wanted else 0.0, 2
                ),
                "wait_p50_ms": round(1000 * statistics.median(waits[seen:]), 1),
                "wait_p99_ms": round(1000 * statistics.quantiles(waits[seen:], n=100)[98], 1),
                "calls_per_s": calls,
                "ended": _cancel(nursery),
            }


def _cancel(nursery: trio.Nursery) -> bool:
    nursery.cancel_scope.cancel()
    return True


async def idle(count: int, endpoints: int, seconds: int = 600, seed: int = 1) -> Figures:
    """Nobody asks anything."""
    async with open_fleet(configuration(endpoints=endpoints), count, seed) as fleet:
        fleet.engines.forget()
        before = counted(fleet)
        await trio.sleep(seconds)
        probes = sum(fleet.engines.probes.values())
        every = fleet.gateways[0].service.config.load_balancer.health_check_interval
        return {
            "gateways": count,
            "endpoints": endpoints,
            "calls_per_s": calls_since(fleet, before, seconds),
            "probes_per_endpoint_and_interval": round(probes / endpoints / (seconds / every), 2),
        }


async def breaker(count: int, rounds: int = 20, seed: int = 1) -> Figures:
    """One gateway's breaker opens: seconds until all have it open."""
    rng, took = random.Random(seed), list[float]()
    async with open_fleet(configuration(1e6, endpoints=rounds), count, seed) as fleet:
        await trio.sleep(2)
        places = list(range(rounds))
        for place in places:
            first = rng.choice(fleet.gateways)
            url = [*first.service.watch][place].url
            while True:
                found = next(e for e in first.service.watch if e.url == url)
                permit = found.breaker.admit(trio.current_time())
                if permit is None:
                    break
                transition = found.breaker.settle(permit, Verdict.BAD, trio.current_time())
                if transition is not None:
                    first.service.admission.on_transition(found, transition)
            began = trio.current_time()
            for gateway in fleet.gateways:
                while _state(gateway, url) is not State.OPEN:  # noqa: ASYNC110  # nobody tells
                    await trio.sleep(0.005)
            took.append(trio.current_time() - began)
            await trio.sleep(rng.uniform(0.5, 1.5))
    return {"gateways": count, "rounds": rounds, **spread_of(took)}


def _state(gateway: Gateway, url: str) -> State:
    endpoint = next(e for e in gateway.service.watch if e.url == url)
    return endpoint.breaker.state(trio.current_time())


def spread_of(took: list[float]) -> Figures:
    return {
        "p50_s": round(statistics.median(took), 3),
        "max_s": round(max(took), 3),
    }


async def death(count: int, cap: int, rounds: int = 8, seed: int = 1) -> Figures:
    """Gateways die with all they hold: seconds until others use it, and until another probes."""
    rng = random.Random(seed)
    back, probing = list[float](), list[float]()
    async with open_fleet(configuration(1e6, cap=cap), count, seed, cap) as fleet:

        async def ask(gateway: Gateway) -> None:
            await gateway.work(rng.expovariate(1 / 2.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrive, fleet, 1.5 * cap / 2.0, 10_000, rng, ask)
            await trio.sleep(5)
            for _ in range(rounds):
                prober = next(g for g in fleet.gateways if _probes(g))
                fleet.kill(prober)
                dead, known = prober.membership.name, fleet.server.memory.caps
                began, is_back, is_probed = trio.current_time(), False, False
                while not (is_back and is_probed):
                    await trio.sleep(0.02)
                    now = trio.current_time() - began
                    if not is_probed and any(map(_probes, fleet.gateways)):
                        is_probed = True
                        probing.append(now)
                    if not is_back and not any(dead in one.shares for one in known.values()):
                        is_back = True
                        back.append(now)
                await fleet.start()
                await trio.sleep(3)
            nursery.cancel_scope.cancel()
    return {
        "gateways": count,
        "cap": cap,
        "rounds": rounds,
        "shares_back": spread_of(back),
        "another_probes": spread_of(probing),
    }


def _probes(gateway: Gateway) -> bool:
    peers = gateway.service.peers
    return peers is not None and peers.findings.is_prober(gateway.endpoint)


async def churn(
    count: int, cap: int, cuts: bool = False, seconds: int = 60, seed: int = 1
) -> Figures:
    """Every other second one comes, dies or goes, or, with *cuts*, is cut off for six seconds.

    All have more to do than the limit and the cap allow.
    """
    rng, rate = random.Random(seed), 200.0
    events = 0
    async with open_fleet(configuration(rate, cap=cap), count, seed, cap) as fleet:
        audit = Audit(rate, round(rate))

        async def ask(gateway: Gateway) -> None:
            window = audit.asked()
            if await gateway.is_let_in("198.51.100.7"):
                audit.admitted(window)
                await gateway.work(rng.expovariate(1 / 2.0))

        async def cut_off(gateway: Gateway) -> None:
            gateway.is_paused = gateway.store.is_cut = True
            await trio.sleep(6.0)
            gateway.is_paused = False
            if gateway in fleet.gateways:
                gateway.store.is_cut = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrive, fleet, 2 * rate, seconds, rng, ask)
            await trio.sleep(5)
            fleet.engines.forget()
            while trio.current_time() - audit.began < seconds - 2:
                await trio.sleep(2)
                events += 1
                one = rng.choice([g for g in fleet.gateways if not g.is_paused])
                match events % 4:
                    case 0:
                        fleet.kill(one)
                    case 1 if cuts:
                        nursery.start_soon(cut_off, one)
                    case 2:
                        await fleet.stop(one)
                    case 3:
                        await fleet.start()
                        await fleet.start()
            fleet.engines.note(0, 0)
            nursery.cancel_scope.cancel()
        engines = fleet.engines
        return {
            "gateways": count,
            "cap": cap,
            "cuts": cuts,
            "events": events,
            "limit": accuracy(audit.between(2, seconds - 2)),
            "excess": round(audit.excess, 2),
            "most": engines.most,
            "over_s": round(engines.over, 3),
            "unused_while_waiting_percent": round(100 * engines.unused / engines.wanted, 2),
        }
