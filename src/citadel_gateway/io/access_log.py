"""The access log's line for one request: facts only, neither prompts nor keys."""

from __future__ import annotations

from typing import Any

from citadel_gateway.io.record import RequestRecord


def access_line(record: RequestRecord) -> dict[str, Any]:
    """Times are milliseconds; fields that say nothing are left out."""
    fields = {
        "level": "info",
        "event": "request",
        "request_id": record.request_id,
        "route": record.route,
        "status": record.status,
        "outcome": record.outcome.value if record.outcome is not None else "internal_error",
        "code": record.error_code,
        "error": record.error,
        "phase": record.phase.value if record.status == 499 else None,
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


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
