"""A whole answer from the events of a stream."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from citadel_gateway.wire.openai_request import Kind

_OBJECTS = {Kind.CHAT: "chat.completion", Kind.COMPLETIONS: "text_completion"}
_ONCE = frozenset({"role", "id", "type", "name", "index"})  # told with the first piece, or repeated


@attrs.define(eq=False)
class Assembly:
    """Puts the pieces together: text is joined, lists grow, of anything else the last word counts.

    :param kind: what was asked for; embeddings do not come in pieces.
    """

    kind: Kind
    _about: dict[str, Any] = attrs.field(factory=dict, init=False)  # everything but the choices
    _choices: dict[int, dict[str, Any]] = attrs.field(factory=dict, init=False)

    def add(self, chunk: dict[str, Any]) -> None:
        """*chunk* is used up."""
        choices = chunk.pop("choices", None)
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._add_choice(choice)
        self._about.update({name: value for name, value in chunk.items() if value is not None})

    def body(self) -> bytes:
        """The answer as it would have come in one piece."""
        choices = [_finished(self._choices[index]) for index in sorted(self._choices)]
        return orjson.dumps({**self._about, "object": _OBJECTS[self.kind], "choices": choices})

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice.pop("index", 0)
        index = index if isinstance(index, int) else 0
        whole = self._choices.get(index)
        if whole is None:
            whole = self._choices[index] = {"index": index, "finish_reason": None, "logprobs": None}
            if self.kind is Kind.COMPLETIONS:
                whole["text"] = ""
            else:
                whole["message"] = {}
        delta = choice.pop("delta", None)
        if isinstance(delta, dict) and isinstance(message := whole.get("message"), dict):
            calls = delta.pop("tool_calls", None)
            _merge(message, delta)
            _add_calls(message, calls if isinstance(calls, list) else [])
        if reason := choice.pop("finish_reason", None):
            whole["finish_reason"] = reason
        _merge(whole, choice)


def _add_calls(message: dict[str, Any], pieces: list[Any]) -> None:
    for piece in pieces:
        if not isinstance(piece, dict):
            continue
        calls: list[dict[str, Any]] = message.setdefault("tool_calls", [])
        index = piece.get("index", len(calls))
        call = next((call for call in calls if call["index"] == index), None)
        if call is None:
            call = {"index": index}
            calls.append(call)
        _merge(call, piece)


def _merge(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        before = whole.get(name)
        if value is None:
            whole.setdefault(name, None)
        elif isinstance(before, str) and isinstance(value, str) and name not in _ONCE:
            whole[name] = before + value
        elif isinstance(before, dict) and isinstance(value, dict):
            _merge(before, value)
        elif isinstance(before, list) and isinstance(value, list):
            before.extend(value)
        else:
            whole[name] = value


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    if message is not None:
        calls = [
            {name: value for name, value in call.items() if name != "index"}
            for call in message.pop("tool_calls", [])
        ]
        message = {"role": "assistant", "content": None, **message}
        if calls:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        elif message["content"] is None:
            message["content"] = ""
        choice["message"] = message
    return choice
