"""What engines say: texts that tell whose they are, in bytes of each engine's own.

A text names the request, the model, the choice and the place of each word, so that a word that is
lost, repeated or somebody else's shows.  Asked twice, engines say the same only where they were
asked to be deterministic: else a text goes off in a :class:`Voice` of its own, soon or late.  Asked
to go on, an engine goes on in the voice that it finds.  Each event names the job that it comes
from, so that it shows who has said it.
"""

from __future__ import annotations

import enum
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import orjson

DONE = b"data: [DONE]\n\n"
COMMENT = b": ping\n\n"
PROMPT_TOKENS = 3
NO_CHOICE = -1

_GAPS = (" ", " ", "\n", " ", "  ", "\n\n")
_END = "\n\n\n"
_SALT = re.compile(r"~[\w/.-]+", re.ASCII)
_TOKENS = {
    True: re.compile(r"\s*\S+|\s+\Z"),  # white space in front of a word, as models have it
    False: re.compile(r"\s*\S+(?:\s+(?=\S))?|\s+\Z"),  # or behind it
}


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


@attrs.frozen
class Voice:
    """How a text differs from others of the same request: by *salt*, from the word *since* on."""

    salt: str = ""
    since: int = 0


PLAIN = Voice()


@attrs.frozen(kw_only=True)
class Answer:
    """What an engine is going to say, token by token and choice by choice.

    :param given: what was said already when it was asked to go on.
    :param is_cut: it says no more because it may not.
    """

    tokens: tuple[tuple[str, ...], ...]
    given: str = ""
    is_cut: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """By choice, with what was given."""
        return tuple(self.given + "".join(tokens) for tokens in self.tokens)

    @property
    def finish(self) -> str:
        return "length" if self.is_cut else "stop"

    @property
    def prompt_tokens(self) -> int:
        return PROMPT_TOKENS + count_tokens(self.given)

    def usage(self, said: int | None = None) -> dict[str, int]:
        """After *said* tokens; by default after all."""
        said = sum(map(len, self.tokens)) if said is None else said
        prompt = self.prompt_tokens
        return {
            "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said
        }  # fmt: skip


def text(request_id: str, model: str, choice: int, voice: Voice = PLAIN) -> str:
    """The whole answer to a request in one voice."""
    seed = sum(f"{request_id} {model}".encode()) * 7
    plain = 1 + seed % 9
    length = plain + sum(voice.salt.encode()) % 3
    since = min(voice.since, plain - 1)
    found = ["\n\n" if seed % 4 == 0 else ""]
    for place in range(length):
        salt = voice.salt if place >= since else ""
        ending = "é☃" if (seed + place) % 4 == 0 else ""
        gap = _GAPS[(seed + place) % len(_GAPS)] if place < length - 1 else ""
        found += [f"{request_id}:{model}:{choice}:{place}{salt}{ending}", gap]
    found.append(_END if seed % 5 == 0 else "")
    return "".join(found)


def goes_on(request_id: str, model: str, given: str) -> str | None:
    """What comes behind *given*; ``None`` if nobody has ever begun like that."""
    salts = [_SALT.search(word) for word in given.split()]
    since = next((place for place, salt in enumerate(salts) if salt), None)
    voice = PLAIN if since is None else Voice(str(salts[since][0]), since)  # type: ignore[index]
    full = text(request_id, model, 0, voice)
    return full[len(given) :] if full.startswith(given) else None


def tokens(text: str, *, leading: bool = True, begins: bool = True) -> tuple[str, ...]:
    """As many, wherever white space belongs.

    :param leading: to the word behind it, but for such as *text* begins or ends with.
    :param begins: nothing was said before.
    """
    blank = text[: len(text) - len(text.lstrip())] if begins and text.strip() else ""
    found = _TOKENS[leading].findall(text[len(blank) :])
    return (blank, *found) if blank else tuple(found)


def count_tokens(text: str) -> int:
    """Of a beginning of an answer."""
    words = len(text.split())
    if not words:
        return 1 if text else 0
    return words + text[0].isspace() + text.endswith(_END)


def whole_answer(path: str, job: str, request_id: str, answer: Answer) -> bytes:
    """A whole answer to a request at *path*."""
    if path.endswith("/embeddings"):
        vector = {"object": "embedding", "index": 0, "embedding": [0.5]}
        return _object("list", job, {"data": [vector], "for": request_id})
    usage = answer.usage()
    if path.endswith("/chat/completions"):
        found = [
            _choice(n, {"message": {"role": "assistant", "content": text}}, answer.finish)
            for n, text in enumerate(answer.texts)
        ]
        return _object("chat.completion", job, {"choices": found, "usage": usage})
    found = [_choice(n, {"text": text}, answer.finish) for n, text in enumerate(answer.texts)]
    return _object("text_completion", job, {"choices": found, "usage": usage})


def stream_events(
    path: str,
    job: str,
    answer: Answer,
    rng: random.Random,
    *,
    usage: bool,
    counts: bool,
    packs: bool,
) -> list[Event]:
    """A whole stream: the choices take turns.

    :param counts: each event with text says how many tokens there were until then.
    :param packs: some events have two tokens.
    """
    chat = path.endswith("/chat/completions")
    choices = range(len(answer.tokens))
    found: list[Event] = []
    if chat and rng.random() < 0.8:
        found += [Event(Said.ROLE, _chunk(job, n, {"role": "assistant"})) for n in choices]
    left = {n: list(answer.tokens[n]) for n in choices}
    said = 0
    while left:
        if rng.random() < 0.03:
            found.append(Event(Said.COMMENT, COMMENT))
        choice = rng.choice(list(left))
        size = 2 if packs and rng.random() < 0.5 else 1
        batch, left[choice] = left[choice][:size], left[choice][size:]
        said += len(batch)
        count = answer.usage(said) if counts else None
        if word := "".join(batch):
            data = _word(job, choice, word, chat=chat, usage=count)
            found.append(Event(Said.CONTENT, data, choice, word))
        if not left[choice]:
            del left[choice]
            found.append(Event(Said.FINISH, _chunk(job, choice, {}, answer.finish), choice))
    if usage:
        data = _event(_object("chunk", job, {"choices": [], "usage": answer.usage()}))
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


def as_the_client_sees(events: Sequence[Event], *, usage: bool) -> list[bytes]:
    """The *events* that are passed on, without the end."""
    hidden = {Said.MALFORMED, Said.DONE, Said.ERROR} | (set() if usage else {Said.USAGE})
    return [event.data for event in events if event.said not in hidden]


@attrs.define
class Heard:
    """What a client makes of the events of its stream.

    :param texts: by choice; what it can make nothing of is text of no choice.
    :param usage: each time that it was told, and how many tokens there were until then.
    :param behind: what came behind the ``[DONE]`` or an error.
    """

    texts: dict[int, str] = attrs.field(factory=dict)
    finishes: Counter[int] = attrs.field(factory=Counter)
    ids: set[str] = attrs.field(factory=set)
    roles: int = 0
    usage: list[tuple[dict[str, int], int]] = attrs.field(factory=list)
    errors: list[Any] = attrs.field(factory=list)
    dones: int = 0
    behind: list[bytes] = attrs.field(factory=list)

    @property
    def is_finished(self) -> bool:
        return bool(self.finishes) and self.finishes.keys() >= self.texts.keys()


def blocks(body: bytes) -> Iterator[bytes]:
    """The whole events of *body*, with their ends."""
    for block in body.split(b"\n\n")[:-1]:
        yield block + b"\n\n"


def heard(body: bytes) -> Heard:
    """The same of the whole events in *body*."""
    found = Heard()
    for block in blocks(body):
        if not block.startswith(b"data: "):
            continue
        if found.dones or found.errors:
            found.behind.append(block)
        data = block.removeprefix(b"data: ").removesuffix(b"\n\n")
        if data == b"[DONE]":
            found.dones += 1
            continue
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            found.texts[NO_CHOICE] = data.decode()
        elif "error" in chunk:
            found.errors.append(chunk["error"])
        else:
            _hear(chunk, found)
    return found


def _hear(chunk: dict[str, Any], found: Heard) -> None:
    found.ids.add(chunk["id"])
    for choice in chunk.get("choices", ()):
        index, delta = choice["index"], choice.get("delta", {})
        found.roles += "role" in delta
        word = choice.get("text") or delta.get("content") or ""
        found.texts[index] = found.texts.get(index, "") + word
        if choice.get("finish_reason"):
            found.finishes[index] += 1
    if usage := chunk.get("usage"):
        found.usage.append((usage, sum(map(count_tokens, found.texts.values()))))


def _word(job: str, choice: int, word: str, *, chat: bool, usage: dict[str, int] | None) -> bytes:
    more = {} if usage is None else {"usage": usage}
    if chat:
        found = {"choices": [_choice(choice, {"delta": {"content": word}}, None)], **more}
        return _event(_object("chat.completion.chunk", job, found))
    found = {"choices": [{"index": choice, "text": word, "finish_reason": None}], **more}
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
