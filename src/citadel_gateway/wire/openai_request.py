"""An OpenAI request: checked for what the gateway relies on, otherwise left as it is.

The body is forwarded byte for byte unless something must change: the name of the model, or the
request for usage numbers.  Fields that the gateway does not know pass through untouched.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final

import attrs

from citadel_gateway.errors import invalid_request
from citadel_gateway.wire.json_object import json_type, parse_object, set_members

AUTO: Final = "auto"
_MAX_MODEL_NAME = 256
_MAX_MESSAGES = 4096
_MAX_ITEMS = 100_000  # of a prompt given as tokens
_CHANGEABLE = ("model", "stream", "stream_options")
_STATEFUL = ("store", "previous_response_id", "background", "conversation")


class Kind(enum.Enum):
    """What is asked for; the value is the path below ``/v1`` on both sides."""

    CHAT = "/chat/completions"
    COMPLETIONS = "/completions"
    EMBEDDINGS = "/embeddings"


@attrs.frozen(kw_only=True)
class InferenceRequest:
    """A request that is fit to be sent upstream.

    :param model: as asked for; ``None`` when absent, empty or "auto".
    :param wants_usage: the client asked for the usage chunk at the end of its stream.
    :param stateless: nothing stays behind at the engine, so it may be sent twice.
    :param prompt_tokens: an estimate, four characters to the token.
    :param max_tokens: the bound on the answer, if the client gave one.
    :param choices: how many choices the answer will have.
    :param named: the value of ``model`` in the body, whatever it means.
    :param options: the value of ``stream_options`` in the body.
    :param changeable: which of the fields that may have to change stand in the body.
    """

    kind: Kind
    body: bytes = attrs.field(repr=False)
    model: str | None
    stream: bool
    wants_usage: bool
    stateless: bool
    prompt_tokens: int
    max_tokens: int | None
    choices: int
    named: str | None
    options: dict[str, Any] | None
    changeable: tuple[str, ...]

    def body_for(self, model: str, *, ask_usage: bool, as_stream: bool = False) -> bytes:
        """The body to send: for *model*, and asking for the usage of a stream if *ask_usage*.

        :param as_stream: ask for a stream, whatever the client asked for.
        """
        changes: dict[str, Any] = {}
        if self.named != model:
            changes["model"] = model
        if ask_usage and self.stream and not self.wants_usage:
            changes["stream_options"] = {**(self.options or {}), "include_usage": True}
        if as_stream and not self.stream:
            changes |= {"stream": True, "stream_options": {"include_usage": True}}
        return set_members(self.body, self.changeable, changes) if changes else self.body


def parse_request(kind: Kind, body: bytes) -> InferenceRequest:
    """Raises a :class:`GatewayError` with status 400 that names the field at fault."""
    return read_request(kind, body, parse_object(body))


def read_request(kind: Kind, body: bytes, fields: dict[str, Any]) -> InferenceRequest:
    """The same for a *body* of which the *fields* are known."""
    for name, value in fields.items():
        if (check := _CHECKS.get(name)) is not None and (problem := check(value)):
            raise invalid_request(f"'{name}' {problem}.", param=name, code="invalid_type")
    match kind:
        case Kind.CHAT:
            _check_messages(fields.get("messages"))
        case Kind.COMPLETIONS:
            _check_input(fields, "prompt")
        case Kind.EMBEDDINGS:
            _check_input(fields, "input")
    stream = kind is not Kind.EMBEDDINGS and fields.get("stream") is True
    options = fields.get("stream_options")
    if options and not stream:
        raise invalid_request(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    model = fields.get("model")
    return InferenceRequest(
        kind=kind,
        body=body,
        model=None if not model or model == AUTO else model,
        stream=stream,
        wants_usage=bool(options and options.get("include_usage")),
        stateless=fields.keys().isdisjoint(_STATEFUL)
        or not any(fields.get(name) for name in _STATEFUL),
        prompt_tokens=len(body) // 4,
        max_tokens=fields.get("max_completion_tokens") or fields.get("max_tokens"),
        choices=_choices(kind, fields),
        named=model,
        options=options,
        changeable=tuple([name for name in _CHANGEABLE if name in fields]),
    )


def _choices(kind: Kind, fields: dict[str, Any]) -> int:
    """``n`` for each prompt; a list of token ids is one prompt."""
    prompt = fields.get("prompt") if kind is Kind.COMPLETIONS else None
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return (len(prompt) if several and prompt else 1) * (fields.get("n") or 1)


def _check_messages(messages: Any) -> None:
    if messages is None:
        raise invalid_request("'messages' is required.", param="messages", code="missing")
    if not isinstance(messages, list):
        raise invalid_request(
            f"'messages' must be a list, not {json_type(messages)}.",
            param="messages", code="invalid_type",
        )  # fmt: skip
    if not messages:
        raise invalid_request("'messages' must not be empty.", param="messages", code="empty")
    if len(messages) > _MAX_MESSAGES:
        raise invalid_request(
            f"'messages' must not be longer than {_MAX_MESSAGES}.",
            param="messages", code="too_long",
        )  # fmt: skip
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid_request(
                f"'messages[{i}]' must be an object, not {json_type(message)}.",
                param=f"messages[{i}]", code="invalid_type",
            )  # fmt: skip
        if not isinstance(message.get("role"), str):
            raise invalid_request(
                f"'messages[{i}].role' must be a string.",
                param=f"messages[{i}].role", code="invalid_type",
            )  # fmt: skip
        if not isinstance(message.get("content"), str | list | None):
            raise invalid_request(
                f"'messages[{i}].content' must be a string, a list or null.",
                param=f"messages[{i}].content", code="invalid_type",
            )  # fmt: skip


def _check_input(fields: dict[str, Any], name: str) -> None:
    value = fields.get(name)
    if value is None:
        raise invalid_request(f"'{name}' is required.", param=name, code="missing")
    if not isinstance(value, str | list):
        raise invalid_request(
            f"'{name}' must be a string or a list, not {json_type(value)}.",
            param=name, code="invalid_type",
        )  # fmt: skip
    if value == []:
        raise invalid_request(f"'{name}' must not be empty.", param=name, code="empty")
    if isinstance(value, list) and len(value) > _MAX_ITEMS:
        raise invalid_request(
            f"'{name}' must not have more than {_MAX_ITEMS} items.", param=name, code="too_long"
        )


def _boolean(value: Any) -> str | None:
    return None if value is None or isinstance(value, bool) else "must be true or false"


def _number(value: Any) -> str | None:
    good = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return None if good else "must be a number"


def _whole(least: int, most: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            return f"must be a whole number from {least} to {most}"
        return None

    return check


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "must be a string"


def _model_name(value: Any) -> str | None:
    if problem := _text(value):
        return problem
    too_long = value is not None and len(value) > _MAX_MODEL_NAME
    return f"must not be longer than {_MAX_MODEL_NAME} characters" if too_long else None


def _object(value: Any) -> str | None:
    return None if value is None or isinstance(value, dict) else "must be an object"


def _list(value: Any) -> str | None:
    return None if value is None or isinstance(value, list) else "must be a list"


def _text_or_list(value: Any) -> str | None:
    good = value is None or isinstance(value, str | list)
    return None if good else "must be a string or a list of strings"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "model": _model_name,
    "stream": _boolean,
    "stream_options": _object,
    "n": _whole(1, 128),
    "best_of": _whole(1, 128),
    "max_tokens": _whole(0, 2**31 - 1),
    "max_completion_tokens": _whole(0, 2**31 - 1),
    "temperature": _number,
    "top_p": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _text_or_list,
    "tools": _list,
    "logit_bias": _object,
    "response_format": _object,
    "user": _text,
}
