"""What the engines say: one answer of sixty words, whole or in events, and every way to spoil it.

An engine goes on where a last message of the assistant ends, if that is how the answer begins.
Its words differ in length and are not all ASCII, so that a join that is off by anything shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs

from tests.support.scripted_engine import (
    LedgerEntry,
    Script,
    Step,
    close,
    hang,
    reset,
    send,
    sleep,
    status,
)

_ACCENTS = ("", "é", "字", "🜚", "ß")
WORDS = tuple(f"{'w' * (n % 4 + 1)}{n}{_ACCENTS[n % 5]} " for n in range(60))
TEXT = "".join(WORDS)
PROMPT_TOKENS = 11

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_END = b"0\r\n\r\n"


@attrs.frozen(kw_only=True)
class Heard:
    """One request, as the engine understands it.

    :param name: the engine's own name for its model.
    :param nth: how many requests it has had so far, with this one; probes do not count.
    :param pace: real seconds for each of the benchmark's.
    """

    name: str
    nth: int
    pace: float
    asked: dict[str, Any]

    @classmethod
    def of(cls, entry: LedgerEntry, *, name: str, nth: int, pace: float) -> Heard:
        return cls(name=name, nth=nth, pace=pace, asked=entry.json)

    @property
    def streamed(self) -> bool:
        return bool(self.asked.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool((self.asked.get("stream_options") or {}).get("include_usage"))

    @property
    def prefill(self) -> str | None:
        """The beginning of an answer, if the request ends with one."""
        last = self.asked["messages"][-1]
        if last.get("role") != "assistant":
            return None
        content = last.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        return content or ""

    @property
    def said(self) -> int:
        """How many characters of the answer the request brings along; 0 if it is something else."""
        prefill = self.prefill or ""
        return len(prefill) if TEXT.startswith(prefill) else 0


Behaviour = Callable[[Heard], Script]


def speaks(heard: Heard) -> Script:
    """The whole answer, as an engine in good health gives it."""
    if not heard.streamed:
        return _whole(heard)
    return Script([*_opening(heard), *_words(heard), *_ending(heard)])


def speaks_slowly(gap: float, *, think: float = 0.0) -> Behaviour:
    """The whole answer, *gap* real seconds between words, after *think* of silence."""

    def behave(heard: Heard) -> Script:
        if not heard.streamed:
            return Script([sleep(think + gap * len(WORDS)), *_whole(heard).steps])
        words = _words(heard, gap=gap)
        return Script([*_opening(heard), sleep(think), *words, *_ending(heard)])

    return behave


def first(times: int, trouble: Behaviour) -> Behaviour:
    """*trouble* for the first *times* requests, a good answer for the rest."""
    return lambda heard: trouble(heard) if heard.nth <= times else speaks(heard)


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """One of *behaviours* for each request; a good answer once they are used up."""

    def behave(heard: Heard) -> Script:
        at = heard.nth - 1
        return (behaviours[at] if at < len(behaviours) else speaks)(heard)

    return behave


def refuses(
    code: int, message: str, *, kind: str = "server_error", name: str | None = None, after: str = ""
) -> Behaviour:
    """An error status with OpenAI's body.

    :param name: the error's `code`.
    :param after: a value for `Retry-After`.
    """
    error = {"message": message, "type": kind, "param": None, "code": name}
    headers = [("retry-after", after)] if after else []
    script = status(code, _dump({"error": error}), headers)
    return lambda _: script


def resets(_: Heard) -> Script:
    """The request is read, and then the connection is reset."""
    return Script([reset()])


def is_silent(_: Heard) -> Script:
    """The request is read, and nothing is ever said."""
    return Script([hang()])


def thinks(seconds: float) -> Behaviour:
    """The head and a first event without content at once, the first word after *seconds*."""

    def behave(heard: Heard) -> Script:
        wait = sleep(seconds * heard.pace)
        return Script([*_opening(heard), wait, *_words(heard), *_ending(heard)])

    return behave


def is_cut(after: int) -> Behaviour:
    """The connection is closed after *after* words, in the middle of the body."""

    def behave(heard: Heard) -> Script:
        upto = len("".join(WORDS[:after]))
        if heard.said >= upto or not heard.streamed:
            return speaks(heard)
        return Script([*_opening(heard), *_words(heard, upto), close()])

    return behave


def stalls(after: int, seconds: float) -> Behaviour:
    """Silence for *seconds* after *after* words, and then the rest."""

    def behave(heard: Heard) -> Script:
        upto = len("".join(WORDS[:after]))
        if heard.said >= upto or not heard.streamed:
            return speaks(heard)
        pause, rest = sleep(seconds * heard.pace), _words(heard, begin=upto)
        return Script([*_opening(heard), *_words(heard, upto), pause, *rest, *_ending(heard)])

    return behave


def hangs(after: int) -> Behaviour:
    """*after* words, and then nothing until the client leaves."""

    def behave(heard: Heard) -> Script:
        upto = len("".join(WORDS[:after]))
        return Script([*_opening(heard), *_words(heard, upto), hang()])

    return behave


def babbles(after: int) -> Behaviour:
    """After *after* words an event that is cut short, so that it is no JSON; then the rest."""

    def behave(heard: Heard) -> Script:
        upto = len("".join(WORDS[:after]))
        nonsense = _event(b'{"id": "chatcmpl-1", "choices": [{"delta": {"con')
        rest = _words(heard, begin=upto)
        return Script([*_opening(heard), *_words(heard, upto), nonsense, *rest, *_ending(heard)])

    return behave


def errs_politely(heard: Heard) -> Script:
    """An error in a 200: the body of a whole answer, or the first event that says anything."""
    error = _dump(
        {"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}}
    )
    if not heard.streamed:
        return status(200, error)
    return Script([*_opening(heard), _event(error), _event(b"[DONE]"), send(_END)])


def forgets_done(heard: Heard) -> Script:
    """Everything but the closing `[DONE]`."""
    return Script([*_opening(heard), *_words(heard), *_ending(heard, done=False)])


def takes_no_prefill(heard: Heard) -> Script:
    """A good answer, unless the request brings the beginning of one."""
    if heard.prefill is None:
        return speaks(heard)
    message = "The last message must be the user's: this model takes no prefill."
    return refuses(400, message, kind="invalid_request_error")(heard)


def _whole(heard: Heard) -> Script:
    said = TEXT[heard.said :]
    choice = {
        "index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"
    }  # fmt: skip
    return status(200, _object(heard, "chat.completion", [choice], usage=True))


def _opening(heard: Heard) -> list[Step]:
    return [send(_HEAD), _chunk(heard, {"role": "assistant", "content": ""})]


def _words(
    heard: Heard, upto: int = len(TEXT), *, begin: int | None = None, gap: float = 0.0
) -> list[Step]:
    """An event for each word between two places in the answer; a word may be cut at the first."""
    begin = heard.said if begin is None else max(begin, heard.said)
    steps: list[Step] = []
    at = 0
    for word in WORDS:
        piece = TEXT[max(at, begin) : min(at + len(word), upto)]
        at += len(word)
        if piece:
            steps += [sleep(gap)] if gap else []
            steps.append(_chunk(heard, {"content": piece}))
    return steps


def _ending(heard: Heard, *, done: bool = True) -> list[Step]:
    steps = [_chunk(heard, {}, "stop")]
    if heard.wants_usage:
        steps.append(_event(_object(heard, "chat.completion.chunk", [], usage=True)))
    if done:
        steps.append(_event(b"[DONE]"))
    return [*steps, send(_END)]


def _chunk(heard: Heard, delta: dict[str, str], finish: str | None = None) -> Step:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _event(_object(heard, "chat.completion.chunk", [choice]))


def _event(data: bytes) -> Step:
    event = b"data: " + data + b"\n\n"
    return send(b"%x\r\n%b\r\n" % (len(event), event))


def _object(
    heard: Heard, kind: str, choices: list[dict[str, Any]], *, usage: bool = False
) -> bytes:
    document: dict[str, Any] = {
        "id": f"chatcmpl-{heard.name}-{heard.nth}",
        "object": kind,
        "created": 1,
        "model": heard.name,
        "choices": choices,
    }
    if usage:
        made = len(_words(heard))
        document["usage"] = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": made,
            "total_tokens": PROMPT_TOKENS + made,
        }
    return _dump(document)


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
