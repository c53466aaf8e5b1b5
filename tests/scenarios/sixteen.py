"""The sixteen scenarios of the field's public benchmark, from their description.

Its baseline for everybody: two retries, thirty seconds, one fallback.
"""

from __future__ import annotations

import math

import trio

from tests.scenarios.judging import PASS, Verdict
from tests.scenarios.scenario import CLOCKS, STREAMED, Shape, Stage, scenario
from tests.scenarios.speech import (
    PROMPT_TOKENS,
    WORDS,
    babbles,
    first,
    forgets_done,
    is_cut,
    is_silent,
    refuses,
    resets,
    speaks,
    stalls,
    takes_no_prefill,
    thinks,
)

_RETRY_AFTER = 2.0  # real seconds: a header has no pace
_OUTAGE = 60.0
_TOO_SLOW = 20.0
_REQUESTS = 20
_EVERY = 4.0

_RATE_LIMITED = refuses(429, "slow down", kind="requests", name="rate_limit_exceeded")


@scenario(
    "S01", "429 with Retry-After: 2",
    primary=first(1, refuses(429, "slow down", kind="requests", after="2")),
)  # fmt: skip
def rate_limited_once(stage: Stage) -> Verdict:
    """The whole answer within 30 s, and the engine is not asked again before its 2 s are over."""
    times = [post.received_at for post in stage.primary.posts]
    soon = [at - times[0] for at in times[1:] if at - times[0] < _RETRY_AFTER]
    verdict = stage.served.unless(not soon, "asked again before its Retry-After was over")
    return stage.in_time(verdict)


@scenario("S02", "429 for ever", primary=_RATE_LIMITED)
def rate_limited_for_ever(stage: Stage) -> Verdict:
    """The fallback's whole answer within 30 s, after at most three attempts at the engine."""
    return stage.in_time(stage.few_attempts(stage.served))


@scenario("S03", "one 500", primary=first(1, refuses(500, "it broke")))
def one_error(stage: Stage) -> Verdict:
    """The whole answer within 30 s, whoever gives it, after at most three attempts at the
    engine."""
    return stage.in_time(stage.few_attempts(stage.served))


@scenario("S04", "503 for ever", primary=refuses(503, "overloaded"))
def unavailable_for_ever(stage: Stage) -> Verdict:
    """The fallback's whole answer within 30 s, after at most three attempts at the engine."""
    return stage.in_time(stage.few_attempts(stage.served))


@scenario("S05", "reset before the head", primary=resets)
def reset_before_head(stage: Stage) -> Verdict:
    """The fallback's whole answer within 30 s, after at most three attempts at the engine."""
    return stage.in_time(stage.few_attempts(stage.served))


@scenario("S06", "no response", primary=is_silent)
def no_response(stage: Stage) -> Verdict:
    """The fallback's whole answer within 30 s, and the silent engine is let go."""
    verdict = stage.in_time(stage.served)
    return verdict.unless(_is_free(stage), "the silent engine still has the request")


@scenario("S07", "first token after 20 s", primary=thinks(20), shapes=STREAMED)
def slow_first_token(stage: Stage) -> Verdict:
    """The whole answer, with its first word before the 20 s are over, and the slow engine is let
    go."""
    told = stage.last
    waited = (told.first or told.ended) - told.began
    if waited >= stage.seconds(_TOO_SLOW):
        return stage.served.unless(False, f"first word after {waited / stage.pace:.0f} s")
    return stage.served.unless(_is_free(stage), "the slow engine still has the request")


@scenario(
    "S08", "stream cut after 40 of 60 words",
    primary=is_cut(40), together=True, shapes=STREAMED,
)  # fmt: skip
def cut_stream(stage: Stage) -> Verdict:
    """All sixty words, joined to the byte, as one stream with one end."""
    return stage.in_time(stage.served)


@scenario(
    "S09", "stream stalls for 30 s after 20 words",
    primary=stalls(20, 30), together=True, shapes=STREAMED,
)  # fmt: skip
def stalled_stream(stage: Stage) -> Verdict:
    """All sixty words, joined to the byte, with no silence of 20 s or more."""
    gap = stage.last.gap
    return stage.served.unless(gap < stage.seconds(_TOO_SLOW), f"{gap / stage.pace:.0f} s silent")


@scenario("S10", "malformed event", primary=babbles(20), shapes=STREAMED)
def malformed_event(stage: Stage) -> Verdict:
    """All sixty words in one stream, without the event that is no JSON."""
    return stage.served.unless(not stage.last.nonsense, "the malformed event was passed on")


@scenario("S11", "no [DONE]", primary=forgets_done, shapes=STREAMED)
def no_done(stage: Stage) -> Verdict:
    """All sixty words, and the `[DONE]` that the engine forgot."""
    return stage.served.unless(stage.last.done, "no [DONE]")


@scenario(
    "S12", "400 context_length_exceeded",
    primary=refuses(
        400, "This model's maximum context length is 4096 tokens.",
        kind="invalid_request_error", name="context_length_exceeded",
    ),
)  # fmt: skip
def too_long(stage: Stage) -> Verdict:
    """The whole answer of the fallback, which holds more, after one attempt at the small one."""
    return stage.few_attempts(stage.served, 1)


@scenario(
    "S13", "400 content filter",
    primary=refuses(
        400, "The prompt was filtered.", kind="invalid_request_error", name="content_filter"
    ),
)  # fmt: skip
def filtered(stage: Stage) -> Verdict:
    """The client gets the 400 after one attempt; nobody else is asked for what was refused."""
    told = stage.last
    verdict = PASS.unless(told.status != 200, "somebody else answered what was refused")
    verdict = verdict.unless(told.status in {200, 400}, f"status {told.status}")
    return stage.few_attempts(verdict, 1)


@scenario(
    "S14", "stream cut, and the other engine takes no prefill",
    primary=is_cut(40), backup=takes_no_prefill, together=True, shapes=STREAMED,
)  # fmt: skip
def cut_without_prefill(stage: Stage) -> Verdict:
    """All sixty words, joined to the byte, as one stream with one end."""
    return stage.in_time(stage.served)


async def ask_through_an_outage(stage: Stage, *, silently: bool = False) -> None:
    """Requests on a grid; one that is late is sent as soon as the last one has ended."""
    began = trio.current_time()

    async def come_back() -> None:
        await trio.sleep(stage.seconds(_OUTAGE))
        stage.engine.come_back()

    stage.engine.go_down(silently=silently)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        for number in range(_REQUESTS):
            await trio.sleep_until(began + stage.seconds(number * _EVERY))
            await stage.ask()


@scenario(
    "S15", "down for 60 s, 20 requests 4 s apart",
    primary=speaks, shapes=(Shape.WHOLE,), play=ask_through_an_outage,
)  # fmt: skip
def outage(stage: Stage) -> Verdict:
    """Every answer whole and within 30 s. The engine that is down is asked three times, until its
    breaker opens, and then once for each 15 s that the breaker rests: seven times at most."""
    return judge_outage(stage)


def judge_outage(stage: Stage) -> Verdict:
    down_until = stage.told[0].began + stage.seconds(_OUTAGE)
    attempts = sum(post.received_at < down_until for post in stage.primary.posts)
    most = CLOCKS.failures + math.ceil(_OUTAGE / CLOCKS.rest)
    verdict = stage.in_time(stage.served)
    during = sum(told.began < down_until for told in stage.told)
    figure = f"{attempts} attempts for {during} requests"
    return verdict.noting(figure).unless(attempts <= most, "asked too often while it was down")


@scenario("S16", "the fallback's model and usage", primary=refuses(503, "overloaded"))
def own_name_and_usage(stage: Stage) -> Verdict:
    """The answer names the model that gave it, and its token counts are that model's own."""
    told = stage.last
    verdict = stage.served.unless("backup" in (told.model or ""), f"model {told.model!r}")
    usage = told.usage or {}
    true = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return verdict.unless(true == (PROMPT_TOKENS, len(WORDS)), f"usage {true}")


def _is_free(stage: Stage) -> bool:
    return all(post.client_left_at is not None for post in stage.primary.posts)
