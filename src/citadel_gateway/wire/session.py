"""What a request belongs to, as a number: the same in every gateway, for all of its requests.

In this order: what the client calls its session in a header, or in the body's ``session_id``,
``prompt_cache_key`` or ``user``; else how the conversation begins, which every later request of it
repeats: its messages up to the first of the user's, or the beginning of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from citadel_gateway.wire.json_object import parse_object
from citadel_gateway.wire.openai_request import InferenceRequest, Kind, read_request

_MEMBERS = ("session_id", "prompt_cache_key", "user")
_ENOUGH = 4096  # characters of a text that tell it from others


def parse_with_key(
    kind: Kind, body: bytes, header: bytes | None
) -> tuple[InferenceRequest, int | None]:
    """The request, as from ``parse_request``, and the key of 64 bits of what it belongs to.

    ``None`` if nothing tells: inputs of embeddings have no history.

    :param header: in which the client may name its session.
    """
    fields = parse_object(body)
    return read_request(kind, body, fields), _key(kind, fields, header)


def _key(kind: Kind, fields: Mapping[str, Any], header: bytes | None) -> int | None:
    if header:
        return _number(header)
    for name in _MEMBERS:
        value = fields.get(name)
        if isinstance(value, str) and value:
            return _number(value.encode())
    match kind:
        case Kind.CHAT:
            return _number("\0".join(_beginning(fields["messages"])).encode())
        case Kind.COMPLETIONS:
            return _number(_start(fields["prompt"]).encode())
        case _:
            return None


def _beginning(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        yield message["role"]
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else content
        for part in parts:
            yield _start(part)
        if message["role"] == "user":
            return


def _start(value: Any) -> str:
    """The beginning of a text, or of whatever else may stand there, without going through it."""
    match value:
        case str():
            return value[:_ENOUGH]
        case dict():
            return "\0".join(_start(value[name]) for name in sorted(value))
        case [*items]:
            return "\0".join(map(_start, items[:_ENOUGH]))
        case _:
            return str(value)


def _number(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
