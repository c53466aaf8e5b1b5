"""What an upstream's ``Retry-After`` means, whatever it holds."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.retry_after import DEFAULT, LONGEST, parse_retry_after

steady = settings(deadline=None, derandomize=True)

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0.0),
        (b"7", 7.0),
        (b" 7 ", 7.0),
        (b"1.5", 1.5),
        (b"60", 60.0),
        (b"3600", LONGEST),
        (b"inf", LONGEST),
        (b"9" * 400, LONGEST),
        (b"Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        (b"Thu, 01 Jan 2026 12:00:30", 30.0),
        (b"Thu, 01 Jan 2026 13:00:30 +0100", 30.0),
        (b"Fri, 01 Jan 2027 00:00:00 GMT", LONGEST),
        (b"Thu, 01 Jan 2026 11:59:59 GMT", DEFAULT),
        (b"Thu, 01 Jan 99999999999999 11:59:59 GMT", DEFAULT),
        (b"-1", DEFAULT),
        (b"nan", DEFAULT),
        (b"soon", DEFAULT),
        (b"", DEFAULT),
        (b"\xff\x00", DEFAULT),
        (None, DEFAULT),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_it_is_read_generously_and_bounded(value: bytes | None, seconds: float) -> None:
    assert parse_retry_after(value, now=NOW) == seconds


def test_dates_are_compared_with_the_clock_when_no_time_is_given() -> None:
    assert parse_retry_after(b"Thu, 01 Jan 2015 12:00:30 GMT") == DEFAULT
    assert parse_retry_after(b"Fri, 31 Dec 9999 23:59:59 GMT") == LONGEST


DATES = st.from_regex(
    rb"\A[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,12} \d{1,3}:\d{1,3}(:\d{1,3})?( [+-]\d{1,9})?\Z"
)


@steady
@given(st.binary(max_size=60) | DATES)
@example(b"Fri, 31 Dec 9999 23:59:59 -2359")
@example(b"Mon, 01 Jan 0001 00:00:00 +2359")
@example(b"1 Jan 1 0:0:99999999999999999999")
def test_nothing_makes_it_fail(value: bytes) -> None:
    assert 0 <= parse_retry_after(value, now=NOW) <= LONGEST
