"""Names have addresses before anybody needs them, and keep the last good ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.io.resolver import Resolver, make_system_lookup


@attrs.define(eq=False)
class NameServer:
    """Answers with what it is set to; nothing means that it fails."""

    answer: list[str] = attrs.field(factory=lambda: ["10.0.0.1"])
    delay: float = 0.0
    asked: list[float] = attrs.field(factory=list)

    async def lookup(self, host: str) -> list[str]:
        self.asked.append(trio.current_time())
        await trio.sleep(self.delay)
        if not self.answer:
            raise OSError("the name server is down")
        return self.answer


@attrs.define(eq=False)
class World:
    server: NameServer
    resolver: Resolver
    news: list[tuple[float, str]]


def make_world(server: NameServer | None = None) -> World:
    server = server or NameServer()
    news: list[tuple[float, str]] = []

    def note(what: str) -> None:
        news.append((trio.current_time(), what))

    resolver = Resolver(
        ttl=10.0,
        lookup=server.lookup,
        on_trouble=lambda host, error: note(f"{host}: {error}"),
        on_change=lambda host: note(f"{host} has changed"),
    )
    return World(server, resolver, news)


@asynccontextmanager
async def running(server: NameServer | None = None) -> AsyncIterator[World]:
    world = make_world(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.resolver.run)
        await wait_all_tasks_blocked()
        yield world
        nursery.cancel_scope.cancel()


async def test_an_answer_is_waited_for_once_and_then_it_is_there(
    autojump_clock: MockClock,
) -> None:
    async with running(NameServer(delay=1.0)) as world:
        took = []
        for _ in range(2):
            began = trio.current_time()
            assert await world.resolver.addresses("engine") == ("10.0.0.1",)
            took.append(trio.current_time() - began)

    assert took == [1.0, 0.0]


async def test_an_answer_is_renewed_in_the_background_and_holds_nobody_up(
    autojump_clock: MockClock,
) -> None:
    async with running() as world:
        await world.resolver.addresses("engine")
        world.server.answer, world.server.delay = ["10.0.0.2"], 5.0
        await trio.sleep(12)
        began = trio.current_time()
        during = await world.resolver.addresses("engine")
        took = trio.current_time() - began
        await trio.sleep(5)
        after = await world.resolver.addresses("engine")

    assert (during, took, after) == (("10.0.0.1",), 0.0, ("10.0.0.2",))
    assert world.server.asked == [0, 10]
    assert world.news == [(0, "engine has changed"), (15, "engine has changed")]


async def test_a_failing_renewal_keeps_the_last_good_answer_and_is_told_once(
    autojump_clock: MockClock,
) -> None:
    async with running() as world:
        await world.resolver.addresses("engine")
        world.server.answer = []
        await trio.sleep(35)
        kept = await world.resolver.addresses("engine")
        world.server.answer = ["10.0.0.1"]
        await trio.sleep(10)

    assert kept == ("10.0.0.1",)
    assert world.news[1:] == [(10, "engine: the name server is down"), (40, "engine: None")]


@pytest.mark.parametrize("is_running", [True, False])
async def test_all_who_ask_first_share_one_lookup(
    autojump_clock: MockClock, is_running: bool
) -> None:
    async with running(NameServer(delay=1.0)) as world:
        resolver = world.resolver
        if not is_running:
            resolver = Resolver(lookup=world.server.lookup)
        async with trio.open_nursery() as asking:
            for _ in range(50):
                asking.start_soon(resolver.addresses, "engine")

    assert world.server.asked == [0]


@pytest.mark.parametrize("is_running", [True, False])
async def test_who_leaves_does_not_take_the_answer_from_the_others(
    autojump_clock: MockClock, is_running: bool
) -> None:
    async with running(NameServer(delay=1.0)) as world:
        resolver = world.resolver
        if not is_running:
            resolver = Resolver(lookup=world.server.lookup)
        answers = []

        async def ask(within: float) -> None:
            with trio.move_on_after(within):
                answers.append(await resolver.addresses("engine"))

        async with trio.open_nursery() as asking:
            asking.start_soon(ask, 0.5)
            asking.start_soon(ask, 5)

    assert answers == [("10.0.0.1",)]


async def test_a_name_that_was_never_known_is_an_error_and_asked_for_again_in_a_second(
    autojump_clock: MockClock,
) -> None:
    async with running(NameServer(answer=[])) as world:
        for _ in range(3):
            with pytest.raises(OSError, match="cannot look up 'engine': the name server is down"):
                await world.resolver.addresses("engine")
        world.server.answer = ["10.0.0.1"]
        await trio.sleep(1)

        assert await world.resolver.addresses("engine") == ("10.0.0.1",)
    assert world.server.asked == [0, 1]


async def test_without_a_task_that_renews_them_old_answers_are_renewed_by_who_asks(
    autojump_clock: MockClock,
) -> None:
    world = make_world()
    for pause in (0, 9, 1):
        await trio.sleep(pause)
        await world.resolver.addresses("engine")

    assert world.server.asked == [0, 10]


async def test_an_address_needs_no_name_server(autojump_clock: MockClock) -> None:
    world = make_world()
    for address in ("127.0.0.1", "::1", "fe80::1%eth0"):
        assert await world.resolver.addresses(address) == (address,)
        assert await world.resolver.next_addresses(address) == [address]
        assert world.resolver.known(address) == (address,)

    assert world.server.asked == []


async def test_each_asks_for_the_addresses_beginning_with_another(
    autojump_clock: MockClock,
) -> None:
    world = make_world(NameServer(answer=["a", "b", "c"]))
    rounds = [await world.resolver.next_addresses("engine") for _ in range(4)]

    assert ["".join(one) for one in rounds] == ["abc", "bca", "cab", "abc"]


async def test_families_take_turns_and_ipv6_is_first(autojump_clock: MockClock) -> None:
    world = make_world(NameServer(answer=["10.0.0.1", "10.0.0.2", "::1", "::2"]))

    assert await world.resolver.next_addresses("engine") == ["::1", "10.0.0.1", "::2", "10.0.0.2"]


async def test_an_address_that_failed_is_tried_last_for_a_while(
    autojump_clock: MockClock,
) -> None:
    world = make_world(NameServer(answer=["::1", "10.0.0.1", "10.0.0.2"]))
    await world.resolver.addresses("engine")
    for address in ("::1", "10.0.0.1"):
        world.resolver.avoid("engine", address)
    during = {(await world.resolver.next_addresses("engine"))[0] for _ in range(3)}
    await trio.sleep(10)
    after = (await world.resolver.next_addresses("engine"))[0]

    assert (during, after) == ({"10.0.0.2"}, "::1")


async def test_an_address_is_current_as_long_as_the_last_good_answer_has_it(
    autojump_clock: MockClock,
) -> None:
    async with running() as world:
        is_current = partial(world.resolver.is_current, "engine")
        assert is_current("10.0.0.1")  # nothing speaks against it
        await world.resolver.addresses("engine")
        seen = [(is_current("10.0.0.1"), is_current("10.0.0.2"))]
        world.server.answer = ["10.0.0.2"]
        await trio.sleep(11)
        seen.append((is_current("10.0.0.1"), is_current("10.0.0.2")))
        world.server.answer = []
        await trio.sleep(11)
        seen.append((is_current("10.0.0.1"), is_current("10.0.0.2")))

    assert seen == [(True, False), (False, True), (False, True)]


async def test_the_system_knows_localhost_and_says_what_it_does_not_know() -> None:
    lookup = make_system_lookup()

    assert {"127.0.0.1", "::1"} & set(await lookup("localhost"))
    with pytest.raises(OSError, match="no name that can be looked up"):
        await lookup("a" * 64 + ".example")
