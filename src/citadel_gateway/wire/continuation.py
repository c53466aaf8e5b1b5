"""How a stream that broke can be continued by another endpoint, and where that would be a lie.

An engine can *resume* from the text so far: a completion's prompt is made longer by it, a chat gets
it as the beginning of the assistant's message.  An engine that refuses that can *replay* the
request, if it was asked to be deterministic; what comes is checked against what was delivered.

Not continued at all: several choices, log probabilities, anything delivered that was not text (a
tool call under way), a prompt that is echoed.  Only replayed, as a resumed engine would begin
anew: structured output, a tool call that was demanded, reasoning, an assistant's message that the
client itself had begun.
"""

from __future__ import annotations

import enum
from typing import Any

import attrs
import orjson

from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.json_object import member, set_members
from citadel_gateway.wire.openai_request import InferenceRequest, Kind
from citadel_gateway.wire.seam import Seam

_SPACE = " \t\r\n"
_STRUCTURE = frozenset({
    "grammar", "json_schema", "regex", "ebnf", "structural_tag", "structured_outputs",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar",
})  # fmt: skip
_OWN_PREFILL = frozenset({"continue_final_message", "add_generation_prompt", "suffix"})


class Prefill(enum.Enum):
    """How an engine is given the beginning of an assistant's message."""

    FLAGGED = "flagged"  # the last message, and `continue_final_message`
    LAST_MESSAGE = "last_message"  # the last message is taken for a beginning as it is
    NONE = "none"  # it would take it for a whole message, and say the next one


class Way(enum.Enum):
    RESUME = "resume"
    REPLAY = "replay"


@attrs.frozen(kw_only=True)
class Continuation:
    """What to send in place of the request, and what to make of the answer.

    :param repeats: white space at the end of what was delivered, of which the engine is not told.
    :param only_ends: all the tokens that were asked for are there.
    :param is_anew: nothing was delivered that the engine could be told.
    """

    way: Way
    request: InferenceRequest
    delivered: Delivered
    repeats: str = ""
    only_ends: bool = False
    is_anew: bool = False

    def make_seam(self) -> Seam:
        """For one attempt."""
        delivered = self.delivered
        if self.way is Way.REPLAY:
            text, thought = delivered.text.decode(), delivered.thought.decode()
            return Seam(delivered, text, thought, is_replay=True)
        return Seam(
            delivered,
            self.repeats,
            "",
            is_replay=False,
            is_mute=self.only_ends,
            is_anew=self.is_anew,
        )


def may_be_continued(request: InferenceRequest) -> bool:
    """Whether it is worth remembering what its stream says."""
    return request.stream and request.choices == 1 and request.stateless


def resume(
    request: InferenceRequest, delivered: Delivered, prefill: Prefill
) -> Continuation | None:
    """Go on from the text so far; ``None`` where an engine would not, or not truly."""
    fields = orjson.loads(request.body)
    if (
        not delivered.is_plain
        or delivered.thought
        or _forbids_any(fields)
        or _forbids_resuming(fields)
    ):
        return None
    whole = delivered.text.decode()
    text = whole.rstrip(_SPACE)
    if text.endswith("\ufffd") or _may_be_stopping(text, fields.get("stop")):
        return None
    changes: dict[str, Any] = {}
    if not text:
        pass  # nothing was said: the request as it is will do
    elif request.kind is Kind.COMPLETIONS:
        prompt = fields["prompt"]
        if isinstance(prompt, str):
            changes["prompt"] = prompt + text
        elif len(prompt) == 1 and isinstance(prompt[0], str):
            changes["prompt"] = [prompt[0] + text]
        else:
            return None  # tokens, which only the engine's own tokenizer could make longer
    elif prefill is Prefill.NONE or fields["messages"][-1]["role"] == "assistant":
        return None
    else:
        changes["messages"] = orjson.Fragment(_with_message(request.body, text))
        if prefill is Prefill.FLAGGED:
            changes |= {"continue_final_message": True, "add_generation_prompt": False}
    # Who begins anew says the white space once more, and spends tokens on it.
    only_ends = bool(text) and _ask_for_the_rest(fields, changes, delivered.tokens)
    return Continuation(
        way=Way.RESUME,
        request=attrs.evolve(request, body=set_members(request.body, fields, changes)),
        delivered=delivered,
        repeats=whole[len(text) :],
        only_ends=only_ends,
        is_anew=not text,
    )


def replay(request: InferenceRequest, delivered: Delivered) -> Continuation | None:
    """Send the same again; ``None`` where a different answer must be expected."""
    fields = orjson.loads(request.body)
    if not delivered.is_plain or _forbids_any(fields) or fields.get("temperature") != 0:
        return None
    return Continuation(way=Way.REPLAY, request=request, delivered=delivered)


def _forbids_any(fields: dict[str, Any]) -> bool:
    return bool(fields.get("echo") or fields.get("logprobs") or (fields.get("best_of") or 1) > 1)


def _forbids_resuming(fields: dict[str, Any]) -> bool:
    response_format = fields.get("response_format") or {}
    return (
        response_format.get("type", "text") != "text"
        or fields.get("tool_choice") not in (None, "none", "auto")
        or fields.get("function_call") not in (None, "none", "auto")
        or any(fields.get(name) for name in _STRUCTURE)
        or any(fields.get(name) is not None for name in _OWN_PREFILL)
    )


def _may_be_stopping(text: str, stop: Any) -> bool:
    """Whether *text* ends in the beginning of a stop sequence, which nobody would see the end of.

    Engines look for them in what they say themselves.
    """
    sequences = [stop] if isinstance(stop, str) else stop or ()
    return any(
        isinstance(sequence, str) and text.endswith(sequence[:length])
        for sequence in sequences
        for length in range(1, len(sequence) + 1)
    )


def _with_message(body: bytes, text: str) -> bytes:
    """The list of messages with one more; those of the client stay as they were written."""
    messages = member(body, "messages").rstrip()
    beginning = orjson.dumps({"role": "assistant", "content": text})
    return messages[:-1] + b"," + beginning + b"]"


def _ask_for_the_rest(fields: dict[str, Any], changes: dict[str, Any], spent: int) -> bool:
    """Take what was delivered from the limits; true if nothing is left."""
    only_ends = False
    for name in ("max_tokens", "max_completion_tokens"):
        most = fields.get(name)
        if isinstance(most, int) and most > 0:
            changes[name] = max(1, most - spent)
            only_ends = only_ends or most <= spent
    if isinstance(least := fields.get("min_tokens"), int) and least > 0:
        changes["min_tokens"] = 0 if only_ends else max(0, least - spent)
    return only_ends
