"""What is read from headers, and how durations are written in them."""

from __future__ import annotations

import re

import pytest

from citadel_gateway.wire.headers import (
    Fields,
    Headers,
    duration_ms,
    first,
    request_id,
    tracing,
    values,
)

HEADERS: Headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]


def test_headers_are_found_by_name() -> None:
    assert (first(HEADERS, b"a"), first(HEADERS, b"c")) == (b"1", None)
    assert (values(HEADERS, b"a"), values(HEADERS, b"c")) == ([b"1", b"3"], [])


@pytest.mark.parametrize(
    "name", [b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id"], ids=repr
)
def test_the_callers_own_id_is_kept(name: bytes) -> None:
    assert request_id(Fields([(name, b"abc-123")])) == "abc-123"


def test_x_request_id_comes_first() -> None:
    assert request_id(Fields([(b"request-id", b"b"), (b"x-request-id", b"a")])) == "a"


@pytest.mark.parametrize(
    "value", [b"", b"a b", b"a\tb", b"a\n", b"\xe9", b"\x7f", b"a" * 129], ids=repr
)
def test_an_id_that_could_spoil_a_log_is_replaced(value: bytes) -> None:
    found = request_id(Fields([(b"x-request-id", value)]))

    assert re.fullmatch("[0-9a-f]{32}", found)


def test_new_ids_differ() -> None:
    assert request_id(Fields([])) != request_id(Fields([]))


def test_only_the_trace_context_passes() -> None:
    trace = [(b"traceparent", b"00-a-b-01"), (b"tracestate", b"k=v")]

    assert (
        tracing(Fields([(b"authorization", b"x"), *trace, (b"cookie", b"y")]), b"x-session-id")
        == trace
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0201, "20ms"),
        (0.25, "250ms"),
        (0.9994, "999ms"),
        (0.9996, "1s"),
        (1.0, "1s"),
        (59.4, "59s"),
        (59.7, "1m0s"),
        (360.0, "6m0s"),
        (4000.0, "66m40s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration_ms(seconds) == text.encode()
