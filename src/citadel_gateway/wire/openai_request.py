"""An OpenAI request: checked for what the gateway relies on, otherwise left as it is.

The body is forwarded byte for byte unless something must change: the name of the model, or the
request for usage numbers.  Fields that the gateway does not know pass through untouched.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable
from typing import Any, Final

import attrs
import orjson

from citadel_gateway.errors import invalid_request

AUTO: Final = "auto"
_MAX_MODEL_NAME = 256
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
    """

    kind: Kind
    body: bytes
    fields: dict[str, Any]
    model: str | None
    stream: bool
    wants_usage: bool
    stateless: bool
    prompt_tokens: int
    max_tokens: int | None

    def body_for(self, model: str, *, ask_usage: bool) -> bytes:
        """The body to send: for *model*, and asking for the usage of a stream if *ask_usage*."""
        changes: dict[str, Any] = {}
        if self.fields.get("model") != model:
            changes["model"] = model
        if ask_usage and self.stream and not self.wants_usage:
            options = self.fields.get("stream_options") or {}
            changes["stream_options"] = {**options, "include_usage": True}
        return _with_changes(self.body, self.fields, changes) if changes else self.body


def parse_request(kind: Kind, body: bytes) -> InferenceRequest:
    """Raises a :class:`GatewayError` with status 400 that names the field at fault."""
    fields = _parse_object(body)
    _check_duplicates(body)
    for name, check in _CHECKS.items():
        if name in fields and (problem := check(fields[name])):
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
        fields=fields,
        model=None if not model or model == AUTO else model,
        stream=stream,
        wants_usage=bool(options and options.get("include_usage")),
        stateless=not any(fields.get(name) for name in _STATEFUL),
        prompt_tokens=len(body) // 4,
        max_tokens=fields.get("max_completion_tokens") or fields.get("max_tokens"),
    )


def _parse_object(body: bytes) -> dict[str, Any]:
    if not body:
        raise invalid_request("The request body is empty; a JSON object is needed.")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise invalid_request(f"The request body is not valid JSON: {exc}.") from None
    if not isinstance(fields, dict):
        raise invalid_request(f"The request body must be a JSON object, not {_json_type(fields)}.")
    return fields


def _check_duplicates(body: bytes) -> None:
    """Refuse keys that stand twice at the top level.

    Parsers take the first or the last, so we might route by one and the engine run the other.
    Only when a key that matters occurs twice as text is the exact and slow look worth taking.
    """
    suspicious = any(body.count(key) > 1 for key in _GUARDED) or rb"\u00" in body
    if not suspicious:
        return
    try:
        pairs = json.loads(body, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise invalid_request("The request body is not valid JSON.") from None
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise invalid_request(
                f"'{name}' is given more than once.", param=name, code="duplicate_key"
            )


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its duplicates."""


_GUARDED = tuple(
    b'"%s"' % name for name in (b"model", b"stream", b"stream_options", b"messages", b"prompt",
                                b"input", b"max_tokens", b"n")
)  # fmt: skip


def _check_messages(messages: Any) -> None:
    if messages is None:
        raise invalid_request("'messages' is required.", param="messages", code="missing")
    if not isinstance(messages, list):
        raise invalid_request(
            f"'messages' must be a list, not {_json_type(messages)}.",
            param="messages", code="invalid_type",
        )  # fmt: skip
    if not messages:
        raise invalid_request("'messages' must not be empty.", param="messages", code="empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid_request(
                f"'messages[{i}]' must be an object, not {_json_type(message)}.",
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
            f"'{name}' must be a string or a list, not {_json_type(value)}.",
            param=name, code="invalid_type",
        )  # fmt: skip
    if value == []:
        raise invalid_request(f"'{name}' must not be empty.", param=name, code="empty")


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


def _json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _with_changes(body: bytes, fields: dict[str, Any], changes: dict[str, Any]) -> bytes:
    """*body* with top-level fields set, by splicing where that is certain to be right.

    Encoding anew would rewrite numbers and escapes of the client's; it is the fallback for a
    field whose place in the text is not beyond doubt.
    """
    for name, value in changes.items():
        encoded = orjson.dumps(value)
        if name not in fields:
            start = body.index(b"{") + 1
            comma = b"," if fields else b""
            body = b"%s%s:%s%s%s" % (body[:start], orjson.dumps(name), encoded, comma, body[start:])
        elif (span := _only_string_value(body, name, fields[name])) is not None:
            body = body[: span[0]] + encoded + body[span[1] :]
        else:
            return orjson.dumps({**fields, **changes})
    return body


def _only_string_value(body: bytes, name: str, value: Any) -> tuple[int, int] | None:
    """Where the string *value* of *name* stands, if ``"name"`` occurs once in the whole text."""
    key = b'"%s"' % name.encode()
    if not isinstance(value, str) or body.count(key) != 1:
        return None
    pattern = re.compile(re.escape(key) + rb"\s*:\s*(" + re.escape(orjson.dumps(value)) + rb")")
    match = pattern.search(body)
    return match.span(1) if match else None
