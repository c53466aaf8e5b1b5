"""Text as tokens, and an answer that says of itself that nobody thought about it.

The tokens are approximate: a token is up to six letters or digits of a word with the space before
it, or one other sign with the space before it, or one further white-space character.  That is
near four characters of English each, and joining the tokens gives the text back exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence

import attrs

_TOKEN = re.compile(r" ?\w{1,6}| ?[^\w\s]|\s")
_FILLER = (
    "This text comes from a simulated engine, so it carries no knowledge.",
    "It is made from your prompt and the name of the model alone.",
    "The same prompt gives the same words again.",
    "Tokens arrive one by one, at the pace of the profile.",
    "A real engine would say something useful here.",
    "The length varies, so that short and long answers both occur.",
    "Behind the gateway, several of these share the work.",
    "Nothing you send here is stored.",
)
_SHORTEST, _LONGEST = 30, 70


def tokenize(text: str) -> list[str]:
    return _TOKEN.findall(text)


@attrs.frozen
class Answer:
    """What one choice will say, token by token, and why it ends."""

    tokens: tuple[str, ...]
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def make_answer(
    model: str,
    prompt: Sequence[str],
    *,
    topic: str = "",
    index: int = 0,
    limit: int,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Answer:
    """The answer to *prompt*: always the same for the same arguments.

    :param topic: what the answer quotes back; the last thing the user said.
    :param index: the number of the choice, so that choices differ.
    :param limit: no more tokens than this; what it cuts ends with ``length``.
    :param stop: the answer ends before the first of these.
    :param ignore_eos: talk on until *limit*, as benchmarks ask.
    """
    seed = hashlib.sha256("\0".join([model, str(index), *prompt]).encode("utf-8", "replace"))
    rng = random.Random(seed.digest())
    natural = limit if ignore_eos else rng.randint(_SHORTEST, _LONGEST)
    tokens = list(itertools.islice(_monologue(model, topic, rng), min(natural, limit)))
    reason = "length" if natural > limit or ignore_eos else "stop"
    return _stop_before(tokens, stop) or Answer(tuple(tokens), reason)


def _monologue(model: str, topic: str, rng: random.Random) -> Iterator[str]:
    """Tokens without end; the first ones say that they are simulated."""
    yield from tokenize(f"[simulated {model}]")
    if words := topic.split()[:8]:
        yield from tokenize(f' You said: "{" ".join(words)[:80]}".')
    while True:
        yield from tokenize(" " + rng.choice(_FILLER))


def _stop_before(tokens: list[str], stop: Sequence[str]) -> Answer | None:
    text = "".join(tokens)
    found = [at for at in map(text.find, stop) if at >= 0]
    if not found:
        return None
    room, kept = min(found), []
    for token in tokens:
        if room <= 0:
            break
        kept.append(token[:room])
        room -= len(token)
    return Answer(tuple(kept), "stop")
