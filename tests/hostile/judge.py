"""What the gateway made of a stream of bytes, held against what the bytes mean."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import attrs

from tests.hostile.engines import INFERENCE, digest
from tests.hostile.oracle import Reading, Request
from tests.hostile.responses import Response, split_responses
from tests.hostile.wire import Ended

_MODEL = re.compile(rb'"model": ?"lane-[a-z]{3}"')


@attrs.frozen
class Outcome:
    """What came back, and what the engine was asked meanwhile."""

    received: bytes
    ended: Ended
    forwarded: tuple[bytes, ...]

    @property
    def statuses(self) -> list[int]:
        return [r.status for r in split_responses(self.received)]

    def is_like(self, other: Outcome) -> bool:
        """Whether the same bytes, delivered in another way, came to the same.

        The refusal of what follows may be left out when an answer before it could already say
        that the connection closes; that depends on when the bytes come, and loses nothing.
        """
        ours, theirs = self.statuses, other.statuses
        shorter, longer = sorted((ours, theirs), key=len)
        rest = longer[len(shorter) :]
        return (
            (self.ended, self.forwarded) == (other.ended, other.forwarded)
            and longer[: len(shorter)] == shorter
            and (not rest or (len(rest) == 1 and rest[0] >= 400 and self.ended == "fin"))
        )


def judge(reading: Reading, outcome: Outcome) -> str | None:
    """What is wrong with *outcome*, if anything.

    The gateway may refuse more than the reading does, never less; each request has at most one
    answer; what is forwarded is what was read, byte for byte and in order.
    """
    try:
        responses = _split(reading, outcome)
    except ValueError as exc:
        return f"the answer cannot be read: {exc}"
    if any(r.status < 200 and r.status != 100 for r in responses):
        return f"an interim answer that nobody needs: {[r.status for r in responses]}"
    final = [r for r in responses if r.status >= 200]
    return (
        _judge_forwarded(reading.requests, outcome.forwarded)
        or _judge_answers(reading, final, outcome.ended)
        or _judge_matching(reading.requests, final)
    )


def _split(reading: Reading, outcome: Outcome) -> list[Response]:
    """The responses. One that refuses a HEAD may have a body: the connection ends with it."""
    methods = [r.method for r in reading.requests]
    try:
        responses = split_responses(outcome.received, methods)
        if reading.end == "refused" and responses and not responses[-1].complete:
            # What was refused may have begun as a HEAD: then it has the head of a refusal only.
            return split_responses(outcome.received, [*methods, b"HEAD"])
        return responses
    except ValueError:
        if b"HEAD" not in methods:
            raise
        head = methods.index(b"HEAD")
        responses = split_responses(outcome.received, methods[:head])
        if len(responses) > head + 1 or not responses[-1].closes or responses[-1].status < 400:
            raise
        return responses


def _judge_forwarded(requests: Sequence[Request], forwarded: Sequence[bytes]) -> str | None:
    """Each body is one of a request that was read, in their order."""
    left = iter(r.body for r in requests if r.method == b"POST" and r.path in INFERENCE)
    for body in forwarded:
        if not any(body == other for other in left):
            return f"the engine was asked what nobody asked: {body[:300]!r}"
    return None


def _judge_answers(reading: Reading, final: Sequence[Response], ended: Ended) -> str | None:
    read, got = len(reading.requests), len(final)
    if any(not response.complete for response in final):
        return "an answer is cut"
    if any(response.closes for response in final[:-1]):
        return "an answer after one that said it was the last"
    last = final[-1] if final else None
    if last is not None and last.closes and ended == "open":
        return "said that it closes, and does not"
    if ended == "rst":
        return "the connection was reset under the answer"
    match reading.end:
        case "clean" | "closed" if got > read:
            return f"{got} answers to {read} requests"
        case "closed" if ended == "open":
            return "does not close although the client asked for it"
        case "incomplete" | "refused" if got > read + 1:
            return f"{got} answers to {read} requests and one that is none"
        case _:
            pass
    if got <= read:
        early = got < read or reading.end == "refused"
        if early and not (ended == "fin" and (last is None or last.closes)):
            return f"{got} answers to {read} requests, and the connection is {ended}"
        if early and last is None:
            return "closed without a word"
        return None
    assert last is not None
    return _judge_refusal(last, ended, early=reading.end == "incomplete")


def _judge_refusal(last: Response, ended: Ended, *, early: bool) -> str | None:
    """*last* answers bytes that are no whole request; *early*, not yet.

    What needs no body may be answered before the body has come, if the connection ends with it.
    """
    if last.status < 400 and not early:
        return f"what is no request was answered with {last.status}"
    if not last.closes or ended != "fin":
        return f"answered {last.status}, but the connection is {ended}"
    may_be_head = not last.body  # of a HEAD, the refusal has no body: see `_split`
    if last.status >= 400 and last.error is None and not may_be_head:
        return f"refused with {last.status} without saying why"
    return None


def _judge_matching(requests: Sequence[Request], final: Sequence[Response]) -> str | None:
    """Whoever has an answer has their own."""
    for request, response in zip(requests, final, strict=False):
        asked = request.method == b"POST" and request.path in INFERENCE
        if asked and response.status == 400 and _refuses_json(response, request):
            return f"refused as no JSON, which it is: {response.body[:200]!r}"
        if not _MODEL.search(request.body):
            continue  # the default model's name was put in, so the engine saw another body
        if not asked or response.status != 200 or b"data: " in response.body:
            continue
        if digest(request.body) not in json.dumps(response.body.decode("latin-1")):
            return f"somebody else's answer: {response.body[:200]!r}"
    return None


def _refuses_json(response: Response, request: Request) -> bool:
    """Whether a whole and sound body was taken for something else: did it arrive?"""
    error = response.error or {}
    if error.get("code") == "bad_http_request" or error.get("param") is not None:
        return False
    try:
        return isinstance(json.loads(request.body), dict)
    except ValueError:
        return False


def is_stricter(reading: Reading, outcome: Outcome) -> bool:
    """Whether a request that the reading takes was refused as no request at all."""
    final = [r for r in _split(reading, outcome) if r.status >= 200]
    if not final or len(final) > len(reading.requests):
        return False
    return (final[-1].error or {}).get("code") == "bad_http_request"
