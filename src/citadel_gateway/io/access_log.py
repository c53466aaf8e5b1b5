"""The access log's line for one request: facts only, neither prompts nor keys."""

from __future__ import annotations

from typing import Any

from citadel_gateway.io.record import Outcome, RequestRecord, is_our_finding

_OF_ENGINES = {Outcome.UPSTREAM_REJECTED, Outcome.UPSTREAM_ERROR, Outcome.STREAM_BROKEN}


def access_line(record: RequestRecord) -> dict[str, Any]:
    """Times are milliseconds; fields that say nothing are left out."""
    outcome = record.outcome or Outcome.INTERNAL_ERROR
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "route": record.route,
        "status": record.status,
        "outcome": outcome.value,
    }
    if outcome is not Outcome.OK:
        fields["code"] = record.error_code
        fields["error"] = record.error if _is_our_own(record) else None
        fields["phase"] = record.phase.value if outcome is Outcome.CLIENT_CLOSED else None
    fields["client"] = record.client
    fields["key_id"] = record.key_id
    fields["model"] = record.model or None
    fields["endpoint"] = record.endpoint or None
    fields["reason"] = record.route_reason or None
    fields["attempts"] = record.attempts
    if record.hedge is not None:
        fields["hedge"] = record.hedge
    fields["stream"] = record.stream
    fields["duration_ms"] = _ms(record.ended - record.began)
    if record.queue_wait:
        fields["priority"] = record.priority
        fields["queue_ms"] = _ms(record.queue_wait)
    fields["upstream_ms"] = _ms(record.upstream_wait)
    fields["bytes_in"] = record.bytes_in
    fields["bytes_out"] = record.bytes_out
    if record.prompt_tokens:
        fields["prompt_tokens"] = record.prompt_tokens
    if record.completion_tokens:
        fields["completion_tokens"] = record.completion_tokens
    if record.committed is not None and record.overhead is not None:
        fields["first_byte_ms"] = _ms(record.committed - record.began)
        fields["overhead_ms"] = _ms(record.overhead)
    return fields if None not in fields.values() else _without_nothing(fields)


def _without_nothing(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _is_our_own(record: RequestRecord) -> bool:
    """Whether the error is in our words: engines quote prompts in theirs."""
    return record.outcome not in _OF_ENGINES or is_our_finding(record.error_code or "")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
