"""Where one stream goes on with what another began: the client must see a single one.

A stream is *resumed* by an engine that was given the text so far: what it sends follows on that.
It is *replayed* by an engine that was given the request once more: what it sends begins with the
text so far, byte for byte, or it is of no use.
"""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.openai_answer import NotAnAnswer, Usage, parse_usage
from citadel_gateway.wire.sse import encode_event

_IDENTITY = ("id", "created", "model", "system_fingerprint")
_THOUGHTS = ("reasoning_content", "reasoning")


class Diverged(NotAnAnswer):
    """A replay that says something else than the client was told; no fault of the engine."""


@attrs.define(eq=False)
class Seam:
    """Makes the events of a second stream a continuation of the first.

    :param text: what the second stream is expected to repeat before it says anything new.
    :param thought: the same of its reasoning.
    :param is_replay: it must repeat them exactly.  Else *text* is white space, which models put in
        front of a word rather than behind the last one, so they are asked to go on without it.
    :param is_mute: all the text is there, and only the end is missing.
    :param is_anew: of what was delivered, the second engine was told nothing.
    """

    delivered: Delivered
    text: str
    thought: str
    is_replay: bool
    is_mute: bool = False
    is_anew: bool = False
    _text_at: int = attrs.field(default=0, init=False)
    _thought_at: int = attrs.field(default=0, init=False)
    _tokens_before: int = attrs.field(init=False)
    _repeated: int = attrs.field(default=0, init=False)  # tokens, which are counted once already
    _is_level: bool = attrs.field(default=False, init=False)  # all of *text* was repeated
    _speaks: bool = attrs.field(default=False, init=False)  # in this chunk
    _tokens: int = attrs.field(default=0, init=False)  # of the second stream, old and new
    _has_role: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._tokens_before = self.delivered.tokens
        self._has_role = self.delivered.has_role

    def join(self, chunk: dict[str, Any]) -> bytes:
        """*chunk* as an event of the first stream; nothing if it has nothing new to say.

        Raises :class:`Diverged`.  *chunk* is changed.
        """
        self._take_identity(chunk)
        says_something = self._speaks = False
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict) and self._join_choice(choice):
                says_something = True
        self._tokens += self._speaks
        if isinstance(usage := chunk.get("usage"), dict):
            second = parse_usage(usage)
            self._tokens = max(self._tokens, second.completion_tokens)
            joined = self.usage(second)
            usage["prompt_tokens"] = joined.prompt_tokens
            usage["completion_tokens"] = joined.completion_tokens
            usage["total_tokens"] = joined.prompt_tokens + joined.completion_tokens
            says_something = says_something or not chunk.get("choices")
        return encode_event(orjson.dumps(chunk)) if says_something else b""

    def count(self, delivered: Delivered) -> None:
        """Correct the number of tokens in *delivered*, which has the chunk that was joined last.

        Who says everything once more may put the end of the old and the beginning of the new into
        one token; but his own count is true.
        """
        if self.is_replay or (self.is_anew and self._is_level):
            delivered.tokens = max(self._tokens_before, self._tokens)

    def usage(self, second: Usage) -> Usage:
        """Of both streams together, as if the request had been answered by one.

        The prompt is the client's own, once.  The text so far was part of the second prompt, so
        it is taken from there and counted as what it is: completion.
        """
        before, prompt = self._tokens_before, second.prompt_tokens
        if self.is_replay:
            return Usage(prompt, max(before, second.completion_tokens))
        repeated = before if self.is_anew and self._is_level else self._repeated
        told = 0 if self.is_anew else before - repeated
        if self.delivered.prompt_tokens is not None:
            prompt = self.delivered.prompt_tokens
        elif prompt > told:
            prompt -= told
        new = 0 if self.is_mute else max(0, second.completion_tokens - repeated)
        return Usage(prompt, before + new)

    def _take_identity(self, chunk: dict[str, Any]) -> None:
        head = self.delivered.head
        if head is None:
            return
        for name in _IDENTITY:
            if name in head:
                chunk[name] = head[name]
            else:
                chunk.pop(name, None)

    def _join_choice(self, choice: dict[str, Any]) -> bool:
        """Whether anything new is left in it."""
        says_something = False
        if isinstance(text := choice.get("text"), str) and text:
            choice["text"] = text = self._new_text(text)
            says_something = bool(text)
        if isinstance(delta := choice.get("delta"), dict):
            says_something = self._join_delta(delta)
        if choice.get("finish_reason"):
            self._check_caught_up("ended")
            return True
        return says_something

    def _join_delta(self, delta: dict[str, Any]) -> bool:
        if self._has_role:
            delta.pop("role", None)
        self._has_role = self._has_role or bool(delta.get("role"))
        says_something = False
        for name, value in delta.items():
            if not value:
                continue
            if name == "content" and isinstance(value, str):
                delta[name] = value = self._new_text(value)
            elif name in _THOUGHTS and isinstance(value, str):
                delta[name] = value = self._new_thought(value)
            elif name != "role":
                self._check_caught_up(f"sent {name}")
            says_something = says_something or bool(value)
        return says_something

    def _new_text(self, said: str) -> str:
        self._speaks = True
        new = self._behind_what_was_said(said)
        self._repeated += not new
        return "" if self.is_mute else new

    def _behind_what_was_said(self, said: str) -> str:
        if self._thought_at < len(self.thought):
            raise Diverged("the replay came to its answer earlier")
        left = len(self.text) - self._text_at
        if not left:
            return said
        repeated = _common(self.text, self._text_at, said)
        self._text_at += repeated
        self._is_level = repeated == left
        if repeated in (left, len(said)):
            return said[repeated:]
        if self.is_replay:
            raise Diverged("the replay differs from what was sent before")
        self._text_at = len(self.text)
        return said[repeated:].removeprefix(" ")  # there is other white space in its place

    def _new_thought(self, said: str) -> str:
        self._speaks = True
        left = len(self.thought) - self._thought_at
        if not left:
            return said
        repeated = _common(self.thought, self._thought_at, said)
        self._thought_at += repeated
        if repeated in (left, len(said)):
            return said[repeated:]
        raise Diverged("the replay differs from what was sent before")

    def _check_caught_up(self, what: str) -> None:
        behind = self._text_at < len(self.text) or self._thought_at < len(self.thought)
        if self.is_replay and behind:
            raise Diverged(f"the replay {what} earlier")


def _common(expected: str, at: int, said: str) -> int:
    """How many characters of *said* are those expected at *at*."""
    if expected.startswith(said, at):
        return len(said)
    length = 0
    for one, other in zip(said, expected[at : at + len(said)], strict=False):
        if one != other:
            break
        length += 1
    return length
