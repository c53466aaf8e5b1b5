"""A supervisor and a worker talk over a real pair of sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from citadel_gateway.io.channel import Channel, NoAnswer, first_news


class Ends:
    """Both ends; the second one answers with what *answer* says."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.heard: list[tuple[str, Any]] = []
        self.news = trio.Event()
        self.one = Channel(ours, self.hear, self.answer)
        self.other = Channel(theirs, self.hear, self.answer)
        self.release = trio.Event()

    def hear(self, what: str, body: Any) -> None:
        self.heard.append((what, body))
        self.news.set()

    async def answer(self, what: str, body: Any) -> Any:
        if what == "slow":
            await self.release.wait()
        return [what, body]


@asynccontextmanager
async def talking() -> AsyncIterator[Ends]:
    ends = Ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.one.run)
        nursery.start_soon(ends.other.run)
        yield ends
        nursery.cancel_scope.cancel()


async def test_a_question_gets_its_own_answer_whatever_else_is_asked() -> None:
    async with talking() as ends, trio.open_nursery() as nursery:
        answers: dict[str, Any] = {}

        async def ask(what: str) -> None:
            answers[what] = await ends.one.ask(what, {"n": what}, within=5)
            ends.release.set()

        nursery.start_soon(ask, "slow")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, "quick")

    assert answers == {w: [w, {"n": w}] for w in ("quick", "slow")}
    assert [*answers] == ["quick", "slow"]


async def test_large_messages_arrive_whole_and_in_order() -> None:
    async with talking() as ends:
        page = "x" * 3_000_000
        for number in range(3):
            ends.other.tell("page", [number, page])
        while len(ends.heard) < 3:
            ends.news = trio.Event()
            await ends.news.wait()

    assert ends.heard == [("page", [number, page]) for number in range(3)]


async def test_no_answer_in_time_is_no_answer(autojump_clock: MockClock) -> None:
    async with talking() as ends:
        began = trio.current_time()
        with pytest.raises(NoAnswer):
            await ends.one.ask("slow", within=3)

        assert trio.current_time() - began == 3


async def test_whoever_waits_learns_that_the_other_end_has_gone() -> None:
    ends = Ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.one.run)

        async def ask() -> None:
            with pytest.raises(NoAnswer):
                await ends.one.ask("anything", within=60)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        ends.other.sock.close()
    with pytest.raises(NoAnswer):
        await ends.one.ask("anything", within=60)


async def test_last_words_are_heard() -> None:
    ends = Ends()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.one.run)
        async with trio.open_nursery() as short_lived:
            short_lived.start_soon(ends.other.run)
            ends.other.tell("last", "x" * 1_000_000)
            await ends.other.finish()
            ends.other.tell("too late")
            short_lived.cancel_scope.cancel()

    assert ends.heard == [("last", "x" * 1_000_000)]


def test_the_first_news_can_be_read_before_there_is_an_event_loop() -> None:
    ours, theirs = socket.socketpair()

    async def answer(what: str, body: Any) -> Any:
        raise AssertionError("nobody asks")

    async def say() -> None:
        channel = Channel(ours, lambda *_: None, answer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.run)
            channel.tell("orders", {"number": 3})
            channel.tell("more", {"number": 4})
            await channel.finish()
            nursery.cancel_scope.cancel()

    trio.run(say)
    with theirs:
        assert first_news(theirs) == {"number": 3}
        assert first_news(theirs) == {"number": 4}
        with pytest.raises(EOFError):
            first_news(theirs)
