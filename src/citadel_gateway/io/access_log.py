"""The access log's line for one request: facts only, neither prompts nor keys."""

from __future__ import annotations

from typing import Any

from citadel_gateway.io.record import Outcome, RequestRecord, is_our_finding

_OF_ENGINES = {Outcome.UPSTREAM_REJECTED, Outcome.UPSTREAM_ERROR, Outcome.STREAM_BROKEN}


def access_line(record: RequestRecord) -> dict[str, Any]:
    """Times are milliseconds; fields that say nothing are left out."""
    fields = {
        "request_id": record.request_id,
        "route": record.route,
        "status": record.status,
        "outcome": record.outcome.value if record.outcome is not None else "internal_error",
        "code": record.error_code,
        "error": record.error if _is_our_own(record) else None,
        "phase": record.phase.value if record.outcome is Outcome.CLIENT_CLOSED else None,
        "client": record.client,
        "key_id": record.key_id,
        "model": record.model or None,
        "endpoint": record.endpoint or None,
        "reason": record.route_reason or None,
        "attempts": record.attempts,
        "stream": record.stream,
        "duration_ms": _ms(record.ended - record.began),
        "queue_ms": _ms(record.queue_wait) if record.queue_wait else None,
        "upstream_ms": _ms(record.upstream_wait),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        "prompt_tokens": record.prompt_tokens or None,
        "completion_tokens": record.completion_tokens or None,
    }
    if record.committed is not None and record.overhead is not None:
        fields["first_byte_ms"] = _ms(record.committed - record.began)
        fields["overhead_ms"] = _ms(record.overhead)
    return {name: value for name, value in fields.items() if value is not None}


def _is_our_own(record: RequestRecord) -> bool:
    """Whether the error is in our words: engines quote prompts in theirs."""
    return record.outcome not in _OF_ENGINES or is_our_finding(record.error_code or "")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
