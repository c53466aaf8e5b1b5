"""Beyond the sixteen: dead processes, outages, clients that leave, endpoints that rest."""

from __future__ import annotations

from functools import partial

import trio

from tests.scenarios.client import Told
from tests.scenarios.engines import Mortal
from tests.scenarios.judging import PASS, Grade, Verdict, refused, worst
from tests.scenarios.scenario import STREAMED, Shape, Stage, scenario
from tests.scenarios.sixteen import ask_through_an_outage, judge_outage
from tests.scenarios.speech import errs_politely, first, hangs, in_turn, is_silent, refuses, speaks

_REQUESTS = 100
_APART = 0.04  # real seconds
_BUDGET = 1.25
_FLOOR = 3.0  # attempts a second
_LOOKS_BACK = 10.0  # seconds' worth of the floor may be spent at once
_RETRY_AFTER = 2.0
_RESTED_BY = 3.5
_AT_ONCE = 0.25  # real seconds for a hang-up to reach the engine
_AT_LAST = 3.0


async def _kill_mid_stream(stage: Stage) -> None:
    def kill_after_twenty(told: Told) -> None:
        if stage.primary.posts and len(told.text.split()) >= 20:
            stage.mortal.kill()

    await stage.ask_until_met(notice=kill_after_twenty)


@scenario(
    "X01", "kill -9 of the engine after 20 words",
    primary=Mortal(gap=0.02), together=True, shapes=STREAMED, play=_kill_mid_stream,
)  # fmt: skip
def killed_mid_stream(stage: Stage) -> Verdict:
    """All sixty words, joined to the byte, though the process of the engine is gone."""
    return stage.in_time(stage.served)


async def _kill_while_thinking(stage: Stage) -> None:
    async def kill_when_asked() -> None:
        await stage.primary.wait_until(lambda: bool(stage.primary.posts))
        await trio.sleep(0.1)
        stage.mortal.kill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_when_asked)
        await stage.ask_until_met()


@scenario(
    "X02", "kill -9 of the engine while it reads the prompt",
    primary=Mortal(gap=0.001, think=0.4), together=True, play=_kill_while_thinking,
)  # fmt: skip
def killed_while_thinking(stage: Stage) -> Verdict:
    """The other engine's whole answer; the client notices nothing."""
    return stage.in_time(stage.served)


async def _ask_in_an_outage(stage: Stage) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(_REQUESTS):
            nursery.start_soon(stage.ask)
            await trio.sleep(_APART)


@scenario(
    "X03", "everything down, 100 requests in 4 s",
    primary=refuses(503, "overloaded"), backup=refuses(503, "overloaded"),
    shapes=(Shape.WHOLE,), alone=True, play=_ask_in_an_outage,
)  # fmt: skip
def full_outage(stage: Stage) -> Verdict:
    """Every client gets an error status within 30 s. All engines together are asked no more often
    than 1.25 times for each request, and 3 times a second on top, of which ten seconds' worth may
    come at once."""
    return _is_cheap(stage)


def _is_cheap(stage: Stage) -> Verdict:
    took = max(told.ended for told in stage.told) - stage.told[0].began
    most = _BUDGET * len(stage.told) + _FLOOR * max(took, _LOOKS_BACK)
    verdict = stage.in_time(worst(refused(told) for told in stage.told))
    figure = f"{stage.attempts} attempts for {len(stage.told)} requests"
    return verdict.noting(figure).unless(stage.attempts <= most, "asked too often")


def _rests(stage: Stage) -> Verdict:
    asked = [post.received_at for post in stage.primary.posts]
    early = sum(0 < at - asked[0] < _RETRY_AFTER for at in asked)
    back = any(at - asked[0] >= _RETRY_AFTER for at in asked)
    verdict = stage.served.unless(not early, f"asked {early} times before its 2 s were over")
    return verdict.unless(back, "never asked again")


async def _ask_for_a_while(stage: Stage) -> None:
    began = trio.current_time()
    while trio.current_time() - began < _RESTED_BY:
        await stage.ask()
        await trio.sleep(0.1)


@scenario(
    "X04", "429 with Retry-After: 2 under load",
    primary=first(1, refuses(429, "slow down", kind="requests", after="2")),
    together=True, shapes=(Shape.WHOLE,), play=_ask_for_a_while,
)  # fmt: skip
def rests_after_429(stage: Stage) -> Verdict:
    """Every answer whole; the endpoint is asked nothing for its 2 s, and something afterwards."""
    return _rests(stage)


@scenario(
    "X05", "503 with Retry-After: 2 under load",
    primary=first(1, refuses(503, "overloaded", after="2")),
    together=True, shapes=(Shape.WHOLE,), play=_ask_for_a_while,
)  # fmt: skip
def rests_after_503(stage: Stage) -> Verdict:
    """Every answer whole; the endpoint is asked nothing for its 2 s, and something afterwards."""
    return _rests(stage)


async def _leave(stage: Stage) -> None:
    streamed = stage.shape is Shape.STREAMED
    if streamed:
        await stage.ask(leave_when=lambda told: len(told.text.split()) >= 5)
    for number in range(1 + streamed, 3 if streamed else 2):
        gone = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_leave_when_asked, stage, number, gone)
            await stage.ask(leave_on=gone)
    with trio.move_on_after(_AT_LAST):
        await stage.primary.wait_until(
            lambda: all(post.client_left_at is not None for post in stage.primary.posts)
        )


async def _leave_when_asked(stage: Stage, number: int, gone: trio.Event) -> None:
    await stage.primary.wait_until(lambda: len(stage.primary.posts) >= number)
    await trio.sleep(0.1)
    gone.set()


@scenario(
    "X06", "the client hangs up",
    primary=in_turn(hangs(5), hangs(0)), backup=None, shapes=STREAMED, play=_leave,
)  # fmt: skip
def client_leaves_a_stream(stage: Stage) -> Verdict:
    """After five words, and before the first: the engine is let go within a quarter second."""
    return _freed(stage)


@scenario(
    "X07", "the client hangs up before a whole answer",
    primary=is_silent, backup=None, shapes=(Shape.WHOLE,), play=_leave,
)  # fmt: skip
def client_leaves_a_whole_answer(stage: Stage) -> Verdict:
    """The engine is let go within a quarter second, though it has not said anything yet."""
    return _freed(stage)


@scenario("X08", "an error inside a 200", primary=errs_politely)
def error_in_a_200(stage: Stage) -> Verdict:
    """The fallback's whole answer within 30 s; the error does not reach the client."""
    return stage.in_time(stage.served)


_NO_KEY = refuses(401, "wrong key", kind="invalid_request_error", name="invalid_api_key")


@scenario(
    "X09", "no engine takes the gateway's key, 100 requests in 4 s",
    primary=_NO_KEY, backup=_NO_KEY, shapes=(Shape.WHOLE,), alone=True, play=_ask_in_an_outage,
)  # fmt: skip
def wrong_key_everywhere(stage: Stage) -> Verdict:
    """As X03, where no breaker helps, since the engines are well."""
    return _is_cheap(stage)


@scenario(
    "X10", "only 500s for 60 s, while the health route says all is well",
    primary=speaks, shapes=(Shape.WHOLE,), play=partial(ask_through_an_outage, silently=True),
)  # fmt: skip
def silent_outage(stage: Stage) -> Verdict:
    """As S15, where no health check helps."""
    return judge_outage(stage)


def _freed(stage: Stage) -> Verdict:
    slowest = 0.0
    for told, post in zip(stage.told, stage.primary.posts, strict=False):
        if post.client_left_at is None:
            return Verdict(Grade.FAIL, "the engine works on for a client who left")
        slowest = max(slowest, post.client_left_at - (told.left_at or told.ended))
    figure = f"let go after {1000 * slowest:.0f} ms"
    return PASS.noting(figure).unless(slowest <= _AT_ONCE, "slow to let go")
