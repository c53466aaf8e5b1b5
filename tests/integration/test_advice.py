"""Whether a client had better try again: ``x-should-retry`` for every way to fail.

OpenAI's clients repeat 408, 409, 429 and 5xx twice unless they are told not to, so an answer that
costs a minute of an engine could be made three times for one click.
"""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.support import scripted_engine as engines
from tests.support.gateway import World, endpoint, fleet, running_gateway
from tests.support.scripted_engine import Script

IDLE = 4.0  # seconds after which no connection of the probes is left in the pool
TIMEOUTS = {"headers": 5, "first_token": 8, "idle": 3}
NEVER = {"retry_ambiguous": "never"}
EITHER, WHOLE, STREAMED = (False, True), (False,), (True,)


@attrs.frozen
class Case:
    """*advice* is what the client is told of *script*, by the only endpoint that there is."""

    name: str
    script: Script | str
    status: int
    advice: str | None
    when: tuple[bool, ...] = EITHER
    options: dict[str, Any] = attrs.field(factory=dict)
    fields: dict[str, Any] = attrs.field(factory=dict)


CASES = [
    # Not executed: to try again costs nothing and may help.
    Case("refused", "refuse", 502, None),
    Case("never accepts", "blackhole", 504, None),
    Case("408", engines.status(408), 408, None),
    Case("429", engines.status(429, b"", [("retry-after", "60")]), 429, None),
    Case("503, loading", engines.loading(), 503, None),
    Case("503, come again", engines.status(503, b"", [("retry-after", "60")]), 503, None),
    Case("404", engines.status(404), 404, None),
    # The caller's fault: no client repeats it.
    Case("400", engines.status(400), 400, None),
    Case("422", engines.status(422), 422, None),
    # It cannot help.
    Case("401", engines.status(401), 502, "false"),
    Case("302", engines.status(302), 502, "false"),
    # It may have been executed.
    Case("500", engines.status(500), 500, "false"),
    Case("502", engines.status(502), 502, "false"),
    Case("504", engines.status(504), 504, "false"),
    Case("hangs up", Script([engines.close()]), 502, "false"),
    Case("nonsense", Script([engines.send(b"hello\r\n\r\n"), engines.close()]), 502, "false"),
    Case("silent", Script([engines.hang()]), 504, "false"),
    Case("silent after the head", engines.stall_after(0), 504, "false"),
    Case("cut after the head", engines.cut_after(0), 502, "false"),
    Case("half an answer", engines.half_body(), 502, "false", WHOLE),
    Case("error instead of a stream", engines.error_event(0), 500, "false", STREAMED),
    Case("500, has state", engines.status(500), 500, "false", WHOLE, {}, {"store": True}),
    Case("500, never repeated", engines.status(500), 500, "false", EITHER, NEVER),
    Case("hangs up, never repeated", Script([engines.close()]), 502, "false", EITHER, NEVER),
]  # fmt: skip
TABLE = [
    pytest.param(case, stream, id=f"{case.name}, {'streamed' if stream else 'whole'}")
    for case in CASES
    for stream in case.when
]


def alone(**options: Any) -> Any:
    return fleet(
        {"m": {"endpoint": endpoint("bad")}},
        load_balancer=options,
        performance={"timeouts": TIMEOUTS},
    )


def break_engine(world: World, name: str, script: Script | str) -> None:
    match script:
        case "refuse":
            world.net.refuse(name, 8000)
        case "blackhole":
            world.net.blackhole(name, 8000)
        case Script():
            world.engines[name].default = script


@pytest.mark.parametrize(("case", "stream"), TABLE)
async def test_clients_are_told_not_to_repeat_what_may_have_been_done(
    autojump_clock: MockClock, case: Case, stream: bool
) -> None:
    async with running_gateway(alone(**case.options)) as world:
        await trio.sleep(IDLE)
        break_engine(world, "bad", case.script)
        response = await world.ask("m", stream=stream, **case.fields)

    assert response.status == case.status
    assert response.header("x-should-retry") == case.advice


async def test_a_repeated_request_that_could_not_be_sent_again_has_been_worked_on_all_the_same(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": ["bad", "down"]})) as world:
        await trio.sleep(IDLE)
        break_engine(world, "bad", Script([engines.close()]))
        break_engine(world, "down", "refuse")
        response = await world.ask("m")

    assert response.json()["error"]["code"] == "upstream_connection_error"
    assert "cannot connect" in response.json()["error"]["message"]
    assert response.header("x-citadel-attempts") == "2"
    assert response.header("x-should-retry") == "false"


async def test_a_request_that_nobody_could_be_reached_for_may_come_again(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        await trio.sleep(IDLE)
        for host in "a", "b":
            break_engine(world, host, "refuse")
        response = await world.ask("m")

    assert response.header("x-citadel-attempts") == "2"
    assert response.header("x-should-retry") is None


@pytest.mark.parametrize("status", [408, 429, 503])
async def test_who_could_not_be_sent_elsewhere_for_want_of_budget_is_told_not_to_repeat(
    autojump_clock: MockClock, status: int
) -> None:
    """Else its own retries would multiply what the budget bounds."""
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        budget = world.service.generation.orchestrator.retrying.budget
        budget.ratio = budget.floor = 0.0
        for engine in world.engines.values():
            engine.default = engines.status(status)
        response = await world.ask("m")

    assert (response.status, response.header("x-citadel-attempts")) == (status, "1")
    assert response.header("x-should-retry") == "false"


async def test_refusals_of_our_own_say_when_to_come_again_and_not_to_stay_away(
    autojump_clock: MockClock,
) -> None:
    """Nothing was done, and the time that they name is true."""
    config = fleet({"m": {"max_concurrent": 1}}, load_balancer={"queue_timeout": 1})
    async with running_gateway(config) as world, trio.open_nursery() as nursery:
        world.engines["m"].default = Script([engines.hang()])
        nursery.start_soon(world.ask, "m")
        await trio.sleep(0.1)
        waited = await world.ask("m")
        world.engines["m"].default = engines.status(503)
        world.endpoint("m").cordon()
        nobody = await world.ask("m")
        nursery.cancel_scope.cancel()

    for response in waited, nobody:
        assert response.status == 503
        assert response.header("retry-after") is not None
        assert response.header("x-should-retry") is None


async def test_a_bug_of_ours_after_an_engine_was_asked_is_not_to_be_met_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        upstream = type(world.service.generation.orchestrator.client)

        async def stumble(*args: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(upstream, "ask", stumble)
        response = await world.ask("m")
        world.log.lines.clear()

    assert (response.status, response.header("x-should-retry")) == (500, "false")
