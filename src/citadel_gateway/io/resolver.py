"""The addresses of names, known before they are asked for.

Theory of operation.  The first time a name is asked for, the answer is waited for; from then on it
is there at once, and as long as :meth:`Resolver.run` runs it is asked for again every *ttl*
seconds in the background.  The system's resolver does not tell how long its answers are good, so
that the time is a setting; an answer that is :class:`Lasting` does.  When asking fails, the last
good answer stays: an engine does not go away because a name server does.  Without
:meth:`Resolver.run`, an old answer is renewed by whoever asks next.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from functools import partial
from itertools import chain, zip_longest
from typing import TypeAlias

import anyio
import anyio.to_thread
import attrs
from anyio.abc import TaskGroup

Lookup: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a name, best first; raises ``OSError``."""


class Lasting(list[str]):
    """An answer that says itself how long it is good.

    :param ttl: in seconds.
    """

    def __init__(self, found: Iterable[str], ttl: float) -> None:
        super().__init__(found)
        self.ttl = ttl


_PATIENCE = 1.0  # seconds after a failed first lookup in which nobody tries again
_THREADS = 8  # lookups at once: a dead name server keeps each for many seconds


def is_address(host: str) -> bool:
    """Whether *host* needs no resolver."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def make_system_lookup() -> Lookup:
    """The operating system's resolver, in threads of its own."""
    limiter = anyio.CapacityLimiter(_THREADS)

    async def lookup(host: str) -> list[str]:
        ask = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        try:
            found = await anyio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=limiter)
        except UnicodeError as exc:
            raise OSError(f"{host!r} is no name that can be looked up") from exc
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))

    return lookup


@attrs.define(eq=False)
class _Name:
    addresses: tuple[str, ...] = ()
    asked: float = float("-inf")
    ttl: float | None = None  # of the last good answer, if that has said so
    error: OSError | None = None
    turn: int = 0
    avoided: dict[str, float] = attrs.field(factory=dict)  # and until when
    is_asked: bool = False  # right now, by a task of the resolver's own
    answered: anyio.Event = attrs.field(factory=anyio.Event)
    lock: anyio.Lock = attrs.field(factory=anyio.Lock)

    def take_turn(self) -> int:
        self.turn += 1
        return self.turn - 1


@attrs.define(eq=False)
class Resolver:
    """Knows the addresses of the names that it was asked for.

    :param ttl: seconds after which an answer is asked for again.
    :param on_trouble: told when a name that was known cannot be looked up any more, and (with
        ``None``) when it can be again; once each.
    :param on_change: told of a name whose addresses are others than before.
    """

    ttl: float = 10.0
    lookup: Lookup = attrs.field(factory=make_system_lookup)
    clock: Callable[[], float] = anyio.current_time
    on_trouble: Callable[[str, OSError | None], None] = lambda _host, _error: None
    on_change: Callable[[str], None] = lambda _host: None
    _names: dict[str, _Name] = attrs.field(factory=dict, init=False)
    _asking: TaskGroup | None = attrs.field(default=None, init=False)

    async def addresses(self, host: str) -> tuple[str, ...]:
        """All addresses of *host*, best first.  Raises ``OSError``.

        Waits only as long as none is known.
        """
        if is_address(host):
            return (host,)
        name = self._names.setdefault(host, _Name())
        if self._is_due(name):
            await self._wait_for_answer(host, name)
        if not name.addresses:
            raise OSError(f"cannot look up {host!r}: {name.error}") from name.error
        return name.addresses

    async def next_addresses(self, host: str) -> list[str]:
        """The same in the order in which to try them, which is another one each time.

        Those to avoid come last.  RFC 8305, "Happy Eyeballs": the families take turns, IPv6 first.
        """
        known = await self.addresses(host)
        if len(known) == 1:
            return list(known)
        name, now = self._names[host], self.clock()
        turn = name.take_turn() % len(known)
        turned = [*known[turn:], *known[:turn]]
        worse = {a for a in turned if name.avoided.get(a, now) > now}
        return [
            *_in_turns(a for a in turned if a not in worse),
            *_in_turns(a for a in turned if a in worse),
        ]

    def avoid(self, host: str, address: str) -> None:
        """Another address was faster, or the only one to answer: try it last for a while."""
        if name := self._names.get(host):
            name.avoided[address] = self.clock() + self.ttl

    def known(self, host: str) -> tuple[str, ...]:
        """The addresses of *host* as far as they are known; never waits."""
        name = self._names.get(host)
        return (host,) if is_address(host) else name.addresses if name else ()

    def trouble(self, host: str) -> OSError | None:
        """Why what is known of *host* may be old; ``None`` if it is not."""
        name = self._names.get(host)
        return None if name is None else name.error

    def knows_any(self) -> bool:
        """Whether any name has been asked for, and not been forgotten."""
        return bool(self._names)

    def is_current(self, host: str, address: str) -> bool:
        """Whether *address* is one of *host*, as far as is known."""
        name = self._names.get(host)
        return name is None or not name.addresses or address in name.addresses

    def forget_others(self, hosts: Set[str]) -> None:
        """Ask no longer for any name but *hosts*; whoever asks for another is told all the same."""
        for host in self._names.keys() - hosts:
            if not self._names[host].is_asked:
                del self._names[host]

    async def run(self) -> None:
        """Keep every answer fresh, for ever."""
        for name in self._names.values():
            name.asked = float("-inf")  # they may be from another event loop, and its clock
        async with anyio.create_task_group() as self._asking:
            try:
                while True:
                    for host, name in self._names.items():
                        if self.clock() - name.asked >= self._ttl_of(name):
                            self._start_asking(self._asking, host, name)
                    await anyio.sleep(min(1.0, self.ttl / 10))
            finally:
                self._asking = None

    def _is_due(self, name: _Name) -> bool:
        age = self.clock() - name.asked
        if not name.addresses:
            return name.error is None or age >= _PATIENCE
        return self._asking is None and not 0 <= age < self._ttl_of(name)

    def _ttl_of(self, name: _Name) -> float:
        """What failed is asked for again sooner than a long answer says."""
        return self.ttl if name.ttl is None or name.error is not None else name.ttl

    async def _wait_for_answer(self, host: str, name: _Name) -> None:
        """One lookup at a time, however many ask; who leaves does not end it for the others."""
        if self._asking is not None:
            self._start_asking(self._asking, host, name)
            await name.answered.wait()
            return
        async with name.lock:
            if self._is_due(name):
                await self._ask(host, name)

    def _start_asking(self, asking: TaskGroup, host: str, name: _Name) -> None:
        if not name.is_asked:
            name.is_asked, name.answered = True, anyio.Event()
            asking.start_soon(self._ask_aside, host, name)

    async def _ask_aside(self, host: str, name: _Name) -> None:
        try:
            await self._ask(host, name)
        finally:
            name.is_asked = False
            name.answered.set()

    async def _ask(self, host: str, name: _Name) -> None:
        name.asked = self.clock()
        try:
            answer = await self.lookup(host)
            found = tuple(answer)
            if not found:
                raise OSError(f"{host!r} has no address")
        except OSError as exc:
            if name.error is None and name.addresses:
                self.on_trouble(host, exc)
            name.error = exc
            return
        if name.error is not None and name.addresses:
            self.on_trouble(host, None)
        before, name.addresses, name.error = set(name.addresses), found, None
        name.ttl = answer.ttl if isinstance(answer, Lasting) else None
        name.avoided = {a: until for a, until in name.avoided.items() if a in found}
        if set(found) != before:
            self.on_change(host)


def _in_turns(addresses: Iterable[str]) -> list[str]:
    families: tuple[list[str], list[str]] = ([], [])
    for address in addresses:
        families[":" not in address].append(address)
    return [a for a in chain.from_iterable(zip_longest(*families)) if a is not None]
