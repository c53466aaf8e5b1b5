"""What a stream has told its client so far, so that another endpoint can go on from there."""

from __future__ import annotations

from typing import Any

import attrs

_SHARED = ("id", "created", "model", "system_fingerprint")
_THOUGHTS = ("reasoning_content", "reasoning")


@attrs.define(eq=False)
class Delivered:
    """The text of one choice, as the client has it.

    Only text is remembered: of a thousand tokens that is four kilobytes.

    :param most: bytes to remember; a stream that says more is not continued.
    """

    most: int
    text: bytearray = attrs.field(factory=bytearray, init=False)
    thought: bytearray = attrs.field(factory=bytearray, init=False)  # reasoning
    tokens: int = attrs.field(default=0, init=False)  # at least: engines may send several at once
    prompt_tokens: int | None = attrs.field(default=None, init=False)  # if the engine has told
    head: dict[str, Any] | None = attrs.field(default=None, init=False)
    has_role: bool = attrs.field(default=False, init=False)
    is_plain: bool = attrs.field(default=True, init=False)  # text is all there was, and is all here
    _current: bytearray = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._current = self.text

    def add(self, text: bytes) -> None:
        """One more token for what the last chunk that was noted has added to."""
        self._current += text
        self.tokens += 1
        if len(self._current) > self.most:
            self._give_up()

    def note(self, chunk: dict[str, Any]) -> None:
        """The client gets *chunk*."""
        if self.head is None:
            self.head = {name: chunk[name] for name in _SHARED if name in chunk}
        said_before, choices = len(self.text) + len(self.thought), chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._note_choice(choice)
        self.tokens += len(self.text) + len(self.thought) > said_before
        usage = chunk.get("usage")
        if isinstance(usage, dict):  # with every chunk, from engines that were asked for that
            self._note_usage(usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if len(self.text) > self.most or len(self.thought) > self.most:
            self._give_up()

    def copy(self) -> Delivered:
        """The same, for an attempt that may come to nothing."""
        copied = attrs.evolve(self)
        copied.text, copied.thought = self.text[:], self.thought[:]
        copied.tokens, copied.prompt_tokens = self.tokens, self.prompt_tokens
        copied.head, copied.has_role, copied.is_plain = self.head, self.has_role, self.is_plain
        copied._current = copied.text
        return copied

    def _note_choice(self, choice: dict[str, Any]) -> None:
        if choice.get("index") or choice.get("logprobs"):
            self.is_plain = False
        if text := choice.get("text"):
            self._append(self.text, text)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        if all(delta.get(name) for name in _THOUGHTS):
            self.is_plain = False  # the same twice, most likely, but who knows
        for name, value in delta.items():
            if not value:
                continue
            if name == "role":
                self.has_role = True
            elif name == "content":
                self._append(self.text, value)
            elif name in _THOUGHTS:
                self._append(self.thought, value)
            else:
                self.is_plain = False

    def _append(self, to: bytearray, text: Any) -> None:
        if isinstance(text, str):
            to += text.encode()
            self._current = to
        else:
            self.is_plain = False

    def _note_usage(self, prompt: Any, completion: Any) -> None:
        if isinstance(prompt, int) and prompt > 0:
            self.prompt_tokens = prompt
        if isinstance(completion, int):
            self.tokens = max(self.tokens, completion)

    def _give_up(self) -> None:
        self.is_plain = False
        self.text.clear()
        self.thought.clear()
