"""Bugs that simulated runs have found, each by itself."""

from __future__ import annotations

import anyio.abc
import attrs
import trio
from trio.testing import MockClock

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.io.dial import Origin
from tests.sim.draw import AskPlan, ClientPlan, Habit, HostPlan, JobFault, Prefill, draw
from tests.sim.invariants import violations
from tests.sim.wires import Wire, wire_pair
from tests.sim.world import simulate_scenario
from tests.support.gateway import CapturedLog, fleet


def test_an_engine_that_lingers_behind_its_end_holds_up_nobody() -> None:
    host = HostPlan(
        host="e", model="m", max_concurrent=1, api_key=None, direct=True, latency=0.0, think=0.01,
        gap=0.0, badness=1.0, refuses_usage=False, engine="auto", server=None,
        prefill=Prefill.IGNORES, lies=False, leading=True, counts=False, packs=False,
        faults=(JobFault.LINGERS,), troubles=(),
    )  # fmt: skip
    asks = tuple(
        AskPlan(
            id=name, path="/v1/completions",
            body={"model": "m", "prompt": f"say {name};", "stream": True}, habit=Habit.PATIENT,
            after=0.0, pause=0.0, timeout=None, key=None, returns=0,
        )
        for name in ("r0", "r1")
    )  # fmt: skip
    scenario = next(s for s in map(draw, range(100)) if not s.config["security"]["api_keys"])
    config = scenario.config | {
        "models": {
            "m": {
                "endpoints": [{"url": scenario.endpoint("e"), "max_concurrent": 1}],
                "upstream_model": "m",
                "timeouts": {},
            }
        },
        "performance": scenario.config["performance"] | {"rate_limiting_enabled": False},
    }
    clients = (ClientPlan(name="c", at=0.0, asks=asks, pipelines=False),)
    run = simulate_scenario(
        attrs.evolve(
            scenario, config=config, hosts=(host,), clients=clients, drains_at=None, reports=False
        )
    )

    assert violations(run) == []
    first, second = run.fleet.jobs[:2]
    assert (first.request_id, second.request_id) == ("r0", "r1")
    assert second.began == first.ended


async def test_a_probe_that_is_under_way_at_the_end_is_no_crash(autojump_clock: MockClock) -> None:
    to_engines, engines = trio.open_memory_channel[Wire](2)

    async def connect(_: Origin) -> anyio.abc.ByteStream:
        gateway, engine = wire_pair(direct=True)
        await to_engines.send(engine)
        return gateway

    log = CapturedLog()
    service = UnifiedAPIGatewayService(
        parse(fleet({"m": {}}), source="test"), connect=connect, log=log
    )
    async with service.open():
        at_start, silent = await engines.receive(), await engines.receive()
        await silent.receive_some()
    at_start.close()
    silent.close()

    assert [line["event"] for line in log.lines if "crash" in line["event"]] == []
