"""Frames are told apart by their first nine bytes, however they are cut."""

from __future__ import annotations

import pytest

from citadel_gateway.wire.http2_frames import FrameCounter, Tally

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int = 0, size: int = 0) -> bytes:
    return size.to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + b"x" * size


DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9


def fed(data: bytes, step: int = 1_000_000) -> tuple[FrameCounter, Tally]:
    counter, resets, idle = FrameCounter(), 0, 0
    data = PREFACE + data
    for start in range(0, len(data), step):
        tally = counter.feed(data[start : start + step])
        resets, idle = resets + tally.resets, idle + tally.idle
    return counter, Tally(resets, idle)


@pytest.mark.parametrize(
    ("one", "tally"),
    [
        (frame(DATA, 0, 5), Tally(0, 0)),
        (frame(DATA, END_STREAM), Tally(0, 0)),
        (frame(DATA), Tally(0, 1)),
        (frame(HEADERS, END_HEADERS, 20), Tally(0, 0)),
        (frame(HEADERS, END_HEADERS), Tally(0, 1)),
        (frame(CONTINUATION), Tally(0, 1)),
        (frame(RST, 0, 4), Tally(1, 0)),
        (frame(PRIORITY, 0, 5), Tally(0, 1)),
        (frame(SETTINGS), Tally(0, 1)),
        (frame(PING, 0, 8), Tally(0, 1)),
        (frame(WINDOW, 0, 4), Tally(0, 1)),
        (frame(0xEE, 0, 4), Tally(0, 1)),
    ],
)
def test_frames_that_carry_nothing_are_counted(one: bytes, tally: Tally) -> None:
    assert fed(one * 3)[1] == Tally(3 * tally.resets, 3 * tally.idle)


@pytest.mark.parametrize("step", [1, 2, 7, 9, 10, 23, 24, 25, 1000])
def test_it_does_not_matter_how_the_bytes_are_cut(step: int) -> None:
    data = frame(HEADERS, END_HEADERS, 31) + frame(DATA, 0, 300) + frame(RST, 0, 4) * 2
    data += frame(PING, 0, 8) * 5 + frame(DATA, 0, 1) + frame(SETTINGS)

    assert fed(data, step)[1] == Tally(resets=2, idle=6)


def test_a_header_block_grows_until_it_ends() -> None:
    counter, _ = fed(frame(HEADERS, 0, 100) + frame(CONTINUATION, 0, 50))
    assert (counter.block, counter.in_head) == (150, True)

    counter.feed(frame(CONTINUATION, END_HEADERS, 50))
    assert (counter.block, counter.in_head) == (200, False)

    counter.feed(frame(HEADERS, END_HEADERS, 10))
    assert (counter.block, counter.in_head) == (10, False)


def test_the_size_of_a_block_is_known_before_it_is_there() -> None:
    counter, _ = fed(frame(HEADERS, 0, 16_000)[:9])

    assert counter.block == 16_000


def test_the_length_of_a_frame_is_known_before_it_is_there() -> None:
    counter, _ = fed(frame(DATA, 0, 70_000)[:9])

    assert counter.longest == 70_000
