"""What an engine answered: is it whole, is it an error, what did it cost?

Answers are looked into, never rewritten; only errors are put into OpenAI's shape, once, whatever
dialect the engine speaks.
"""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from citadel_gateway.errors import error_body
from citadel_gateway.wire.openai_request import Kind


@attrs.frozen
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NotAnAnswer(Exception):
    """The engine said 200 and then something that is no answer."""


@attrs.frozen
class EngineError(Exception):
    """The engine reported an error, with or without an error status."""

    status: int
    message: str
    kind: str
    code: str | None
    param: str | None

    def body(self) -> bytes:
        return error_body(self.message, self.kind, self.code, self.param)


def check_whole_answer(kind: Kind, body: bytes) -> Usage:
    """Usage of a complete answer.  Raises :class:`NotAnAnswer` or :class:`EngineError`."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        what = "an empty body" if not body else "something that is not JSON"
        raise NotAnAnswer(f"the upstream answered 200 with {what}") from None
    if not isinstance(answer, dict):
        raise NotAnAnswer("the upstream answered 200 with JSON that is not an object")
    if is_error(answer):
        raise parse_error(502, body)
    wanted = "data" if kind is Kind.EMBEDDINGS else "choices"
    found = answer.get(wanted)
    if not isinstance(found, list) or not found:
        raise NotAnAnswer(f"the upstream's answer has no list of {wanted}, or an empty one")
    return parse_usage(answer.get("usage"))


def is_error(answer: dict[str, Any]) -> bool:
    return bool(answer.get("error")) or answer.get("object") == "error"


def raise_if_error(body: bytes) -> None:
    """Raises :class:`EngineError` if *body* is an error that came with a good status."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return
    if isinstance(answer, dict) and is_error(answer):
        raise parse_error(502, body)


def parse_usage(usage: Any) -> Usage:
    """Token counts; absent or absurd ones are zero."""
    if not isinstance(usage, dict):
        return Usage()
    return Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int:
    sane = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
    return value if sane else 0


def parse_error(status: int, body: bytes) -> EngineError:
    """An engine's error in OpenAI's terms.

    Understood are ``{"error": {...}}``, ``{"error": "text"}``, vLLM's older
    ``{"object": "error", ...}``, FastAPI's ``{"detail": ...}``, and plain text.

    :param status: what to answer with if the body names no better one.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = _plain_text(body)
    error: Any = answer
    if isinstance(answer, dict):
        error = answer.get("error") or answer.get("detail") or answer
    if isinstance(error, list):
        error = orjson.dumps(error).decode()  # FastAPI's list of what is wrong with which field
    if isinstance(error, str) and error:
        error = {"message": error}
    if not isinstance(error, dict):
        error = {"message": f"The upstream answered with status {status} and no explanation."}
    return _engine_error(status, error)


def _plain_text(body: bytes) -> str:
    """*body* as an explanation; markup, as proxies send it, is none."""
    text = body.decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text


def _engine_error(status: int, error: dict[str, Any]) -> EngineError:
    code = error.get("code")
    if isinstance(code, int) and 400 <= code <= 599 and status in {200, 502}:
        status = code  # inside a 200, the code is the only status there is
    kind = error.get("type")
    default = "invalid_request_error" if status < 500 else "server_error"
    message = error.get("message")
    message = message if isinstance(message, str) and message else f"The upstream failed: {error}"
    param = error.get("param")
    if kind == "exceed_context_size_error" or "maximum context length" in message:
        kind, code, param = "invalid_request_error", "context_length_exceeded", "messages"
    return EngineError(
        status=status,
        message=message[:4000],
        kind=kind if isinstance(kind, str) and kind else default,
        code=code if isinstance(code, str) and code else None,
        param=param if isinstance(param, str) else None,
    )
