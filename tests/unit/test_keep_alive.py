"""Comments to a client who waits, beside the work that it waits for."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.io.keep_alive import COMMENT, kept_alive
from citadel_gateway.io.stream_relay import Sink


class SlowSink:
    """Takes three seconds for everything."""

    takes_at_once = False

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def write_now(self, data: bytes) -> bytes:
        return data

    async def write_rest(self, rest: bytes) -> None:
        await self.write(rest)

    async def start_early(self, data: bytes) -> None:
        await self.write(data)

    async def start(self, data: bytes) -> None:
        await self.write(data)

    async def write(self, data: bytes) -> None:
        await trio.sleep(3)
        self.received.append(data)

    async def finish(self, data: bytes) -> None:
        await self.write(data)


async def test_work_that_fails_while_a_comment_is_on_its_way_tears_nothing(
    autojump_clock: MockClock,
) -> None:
    sink = SlowSink()

    async def work(_: Sink) -> None:
        await trio.sleep(2)
        raise LookupError

    with pytest.raises(LookupError):
        await kept_alive(sink, 1.0, work, begun=False)

    assert sink.received == [COMMENT]
    assert trio.current_time() == 4


async def test_no_comment_comes_behind_the_first_word(autojump_clock: MockClock) -> None:
    sink = SlowSink()

    async def work(waiting: Sink) -> None:
        await trio.sleep(2)
        await waiting.start(b"word")
        await trio.sleep(10)

    await kept_alive(sink, 1.0, work, begun=False)

    assert sink.received == [COMMENT, b"word"]
