"""A JSON object whose text matters: read it strictly, change members without touching the rest.

Encoding anew would rewrite the client's numbers and escapes, so changes are spliced into the
text.  That needs the place of every member, which is looked for only where something changes.

A name that stands twice is refused: parsers take the first or the last, so we might route by one
and the engine run the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from typing import Any, TypeAlias

import orjson

from citadel_gateway.errors import invalid_request

MAX_DEPTH = 64
MAX_MEMBERS = 1000
MAX_CONTAINERS = 100_000  # objects and lists; each costs far more time and memory than its text
_SMALL = 16 * 1024  # a body in which it is quicker to count a name than to walk the text
_MAX_NAME = 100  # of a name that is quoted in an error

Span: TypeAlias = tuple[int, int]
"""Where a value stands in the text: its first byte, and the one behind its last."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def parse_object(body: bytes) -> dict[str, Any]:
    """The members of the object.

    Raises a :class:`GatewayError` with status 400.
    """
    if not body:
        raise invalid_request("The request body is empty; a JSON object is needed.")
    containers = body.count(b"{") + body.count(b"[")
    if containers > MAX_CONTAINERS:
        raise invalid_request(
            f"The request body has more than {MAX_CONTAINERS} objects and lists.",
            code="too_long",
        )
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise invalid_request(f"The request body is not valid JSON: {exc}.") from None
    if not isinstance(fields, dict):
        raise invalid_request(f"The request body must be a JSON object, not {json_type(fields)}.")
    if len(fields) > MAX_MEMBERS:
        raise invalid_request(f"The request body has more than {MAX_MEMBERS} fields.")
    if containers > MAX_DEPTH and _is_deeper(fields, MAX_DEPTH):
        raise invalid_request(f"The request body is nested deeper than {MAX_DEPTH} levels.")
    if not _is_each_written_once(body, fields):
        _find_values(body, len(fields))
    return fields


def set_members(body: bytes, known: Container[str], changes: Mapping[str, Any]) -> bytes:
    """*body* with the values of *changes*; all else stays as it was, byte for byte.

    :param known: which of the names in *changes* stand in *body*, at least.
    """
    spans = _find_values(body) if any(name in known for name in changes) else {}
    places = [(spans[name], value) for name, value in changes.items() if name in spans]
    for (start, end), value in sorted(places, reverse=True):
        body = body[:start] + orjson.dumps(value) + body[end:]
    added = [
        orjson.dumps(name) + b":" + orjson.dumps(value)
        for name, value in changes.items()
        if name not in spans
    ]
    if not added:
        return body
    start = body.index(b"{") + 1
    comma = b"" if body[start:].lstrip().startswith(b"}") else b","
    return body[:start] + b",".join(added) + comma + body[start:]


def member(body: bytes, name: str) -> bytes:
    """The value of *name* as it is written in *body*, which has it."""
    start, end = _find_values(body)[name]
    return body[start:end]


def json_type(value: Any) -> str:
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


def _is_each_written_once(body: bytes, fields: Mapping[str, Any]) -> bool:
    """Whether it is plain, without walking through the text, that no name stands twice.

    A plain name has one spelling but for escapes like ``\\u006d``: if the body has none of those
    and the quoted name is found once, the member is there once.
    """
    if len(body) > _SMALL or b"\\u" in body:
        return False
    for name in fields:
        if not name.isidentifier() or body.count(f'"{name}"'.encode()) != 1:
            return False
    return True


def _find_values(body: bytes, count: int | None = None) -> dict[str, Span]:
    """Where the values stand in *body*, which is a valid object of *count* different names.

    Raises a :class:`GatewayError` if a name stands twice.
    """
    text = body.decode("latin-1")  # a character for each byte, so that positions are the same
    spans: dict[str, Span] = {}
    at = _skip_space(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        start = _skip_space(text, _skip_space(text, at) + 1)  # behind the colon
        _, end = _DECODER.raw_decode(text, start)
        if name in spans or len(spans) == count:
            name = name[:_MAX_NAME]
            raise invalid_request(
                f"'{name}' is given more than once.", param=name, code="duplicate_key"
            )
        spans[name] = start, end
        at = _skip_space(text, end)
        if text[at] == ",":
            at = _skip_space(text, at + 1)
    return spans


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _is_deeper(value: Any, most: int) -> bool:
    layer = [value]
    for _ in range(most):
        layer = [
            child
            for node in layer
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not layer:
            return False
    return True
