"""A stream cut into events: every byte kept, wherever the network cuts it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.sse import (
    DONE,
    MAX_EVENT,
    EventSplitter,
    EventTooLarge,
    encode_event,
    event_data,
)

steady = settings(deadline=None, derandomize=True)


def split(*pieces: bytes) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter()
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return events, splitter.rest()


def test_an_event_comes_out_when_its_blank_line_is_there() -> None:
    splitter = EventSplitter()

    assert splitter.feed(b"data: a\n") == []
    assert splitter.feed(b"\ndata: b\n\n: c\n\nda") == [b"data: a\n\n", b"data: b\n\n", b": c\n\n"]
    assert splitter.rest() == b"da"
    assert splitter.rest() == b""


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_an_event_does_not_wait_for_the_next_one(end: bytes) -> None:
    event = b"data: a" + end + end

    assert split(event) == ([event], b"")


def test_a_crlf_cut_in_two_does_not_make_two_line_ends() -> None:
    one, two = b"data: a\r\n\r\n", b"data: b\r\n\r\n"
    data = one + two

    for cut in range(len(data)):
        assert split(data[:cut], data[cut:]) == ([one, two], b"")


LINES = st.sampled_from(
    [b"data: x", b"data:", b": ping", b"event: e", b"data: [DONE]", b"", b"\xff"]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=30).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


@steady
@given(STREAMS, st.binary(max_size=5), st.lists(st.integers(0, 300), max_size=15))
def test_any_cuts_give_the_same_events_and_lose_no_byte(
    stream: bytes, tail: bytes, cuts: list[int]
) -> None:
    data = stream + tail
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]

    events, rest = split(*(data[a:b] for a, b in pairwise(edges)))

    assert b"".join(events) + rest == data
    assert (events, rest) == split(data)


@steady
@given(st.lists(st.sampled_from([b"data: x", b": c", b"event: e\ndata: y"]), max_size=9))
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_events_are_what_lies_between_blank_lines(end: bytes, events: list[bytes]) -> None:
    written = [event.replace(b"\n", end) + end + end for event in events]

    found, rest = split(b"".join(written))

    assert [*found, *([rest] if rest else [])] == written


def test_an_event_of_more_than_a_mebibyte_is_refused() -> None:
    splitter = EventSplitter()
    splitter.feed(b"data: ".ljust(MAX_EVENT, b"x"))

    with pytest.raises(EventTooLarge):
        splitter.feed(b"x")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"data: {}\r\r", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\ndata: b\n", b"a\nb"),
        (b"event: e\nid: 1\ndata: a\n\n", b"a"),
        (b"data: a\nid: 1\n\n", b"a"),
        (b": c\ndata: a\n\n", b"a"),
        (b"\ndata: a\n\n", b"a"),
        (b"data: a", b"a"),
        (b"data: a\n", b"a"),
        (b"data:\n\n", b""),
        (b": ping\n\n", None),
        (b"event: e\n\n", None),
        (b"datas: a\n\n", None),
        (b"\n\n", None),
        (b"", None),
    ],
    ids=repr,
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert event_data(event) == data


def test_what_is_encoded_is_read_back() -> None:
    assert DONE == b"data: [DONE]\n\n"
    assert split(encode_event(b"{}") + DONE) == ([b"data: {}\n\n", DONE], b"")
    assert event_data(encode_event(b"{}")) == b"{}"
