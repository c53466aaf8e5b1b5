"""What engines say: the same text for the same request, whoever is asked, in bytes of their own.

The text names the request, the choice and the place of each word, so that a word that is lost,
repeated or somebody else's shows.  Each event names the job, so that it shows who has said it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from typing import Any

import attrs
import orjson

DONE = b"data: [DONE]\n\n"
NO_CHOICE = -1


class Said(enum.Enum):
    """What an event is, to its client."""

    ROLE = enum.auto()
    COMMENT = enum.auto()
    CONTENT = enum.auto()
    FINISH = enum.auto()
    USAGE = enum.auto()
    DONE = enum.auto()
    MALFORMED = enum.auto()
    ERROR = enum.auto()


@attrs.frozen
class Event:
    """A server-sent event, and the word of which choice it adds."""

    said: Said
    data: bytes
    choice: int = 0
    word: str = ""


def words(request_id: str, choice: int) -> list[str]:
    """The answer to a request, as every engine gives it."""
    n = 1 + sum(request_id.encode()) * 7 % 9
    return [f"{request_id}:{choice}:{place} " for place in range(n)]


def text(request_id: str, choice: int) -> str:
    return "".join(words(request_id, choice))


def whole_answer(path: str, job: str, request_id: str, choices: int) -> bytes:
    """A whole answer to a request at *path*."""
    if path.endswith("/embeddings"):
        vector = {"object": "embedding", "index": 0, "embedding": [0.5]}
        return _object("list", job, {"data": [vector], "text": text(request_id, 0)})
    if path.endswith("/chat/completions"):
        found = [
            _choice(n, {"message": {"role": "assistant", "content": text(request_id, n)}}, "stop")
            for n in range(choices)
        ]
        return _object("chat.completion", job, {"choices": found, "usage": _usage(request_id)})
    found = [_choice(n, {"text": text(request_id, n)}, "length") for n in range(choices)]
    return _object("text_completion", job, {"choices": found, "usage": _usage(request_id)})


def stream_events(
    path: str, job: str, request_id: str, choices: int, usage: bool, rng: random.Random
) -> list[Event]:
    """A whole stream: the choices take turns."""
    chat = path.endswith("/chat/completions")
    found: list[Event] = []
    if chat and rng.random() < 0.8:
        found += [Event(Said.ROLE, _chunk(job, n, {"role": "assistant"})) for n in range(choices)]
    left = {n: words(request_id, n) for n in range(choices)}
    while left:
        if rng.random() < 0.03:
            found.append(Event(Said.COMMENT, b": ping\n\n"))
        choice = rng.choice(list(left))
        word = left[choice].pop(0)
        found.append(Event(Said.CONTENT, _word(job, choice, word, chat=chat), choice, word))
        if not left[choice]:
            del left[choice]
            found.append(Event(Said.FINISH, _chunk(job, choice, {}, "stop"), choice))
    if usage:
        data = _event(_object("chunk", job, {"choices": [], "usage": _usage(request_id)}))
        found.append(Event(Said.USAGE, data))
    found.append(Event(Said.DONE, DONE))
    return found


def malformed(rng: random.Random) -> Event:
    data = rng.choice([b'{"choices": [{"ind', b"not JSON", b"[1, 2]", b'"text"'])
    return Event(Said.MALFORMED, _event(data))


def error_event() -> Event:
    error = {"message": "the engine gave up", "type": "server_error", "code": 500}
    return Event(Said.ERROR, _event(orjson.dumps({"error": error})))


def quiet_event(job: str) -> Event:
    return Event(Said.ROLE, _chunk(job, 0, {"role": "assistant"}))


def as_the_client_sees(events: Sequence[Event], *, usage: bool) -> bytes:
    """The bytes of *events* as far as they are passed on, without the end."""
    hidden = {Said.MALFORMED, Said.DONE, Said.ERROR} | (set() if usage else {Said.USAGE})
    return b"".join(event.data for event in events if event.said not in hidden)


def heard(body: bytes) -> tuple[dict[int, str], bool, Any]:
    """What a stream's client makes of it: the text by choice, whether all ended, and an error.

    What it can make nothing of is text of no choice.
    """
    found: dict[int, str] = {}
    finished: set[int] = set()
    error: Any = None
    for block in body.split(b"\n\n"):
        data = block.removeprefix(b"data: ")
        if not block.startswith(b"data: ") or data == b"[DONE]":
            continue
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            found[NO_CHOICE] = data.decode()
            continue
        error = chunk.get("error", error)
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            word = choice.get("text") or choice.get("delta", {}).get("content") or ""
            found[index] = found.get(index, "") + word
            if choice.get("finish_reason"):
                finished.add(index)
    return found, bool(finished) and finished >= found.keys(), error


def _usage(request_id: str) -> dict[str, int]:
    said = len(words(request_id, 0))
    return {"prompt_tokens": 3, "completion_tokens": said, "total_tokens": 3 + said}


def _word(job: str, choice: int, word: str, *, chat: bool) -> bytes:
    if chat:
        return _chunk(job, choice, {"content": word})
    found = {"choices": [{"index": choice, "text": word, "finish_reason": None}]}
    return _event(_object("text_completion", job, found))


def _chunk(job: str, choice: int, delta: dict[str, str], finish: str | None = None) -> bytes:
    found = {"choices": [_choice(choice, {"delta": delta}, finish)]}
    return _event(_object("chat.completion.chunk", job, found))


def _choice(index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **said, "finish_reason": finish}


def _object(kind: str, job: str, members: dict[str, Any]) -> bytes:
    return orjson.dumps({"id": job, "object": kind, "created": 1, "model": "simulated", **members})


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
