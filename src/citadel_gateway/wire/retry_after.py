"""The ``Retry-After`` header of an upstream, which may hold anything."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST = 60.0
DEFAULT = 1.0


def parse_retry_after(value: bytes | None, *, now: datetime | None = None) -> float:
    """Seconds to wait, from 0 to :data:`LONGEST`; :data:`DEFAULT` for nonsense.

    :param now: wall-clock time, for values that are dates.
    """
    if value is None:
        return DEFAULT
    text = value.decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        seconds = _until(text, now or datetime.now(UTC))
    return min(seconds, LONGEST) if seconds >= 0 else DEFAULT


def _until(text: str, now: datetime) -> float:
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return -1.0
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return (then - now).total_seconds()
