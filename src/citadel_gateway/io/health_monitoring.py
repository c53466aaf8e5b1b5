"""Asks endpoints how they are, without ever spending inference on it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn, Protocol

import attrs
import httpx
import trio

from citadel_gateway.io.dial import Origin, is_our_own_lack
from citadel_gateway.io.recognition import recognise
from citadel_gateway.io.target import split_url
from citadel_gateway.io.transport import ORIGIN
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.wire.engine_signs import LLAMACPP_SERVER

_MOST_READ = 64 * 1024
_SOON = 5.0  # seconds between probes of an endpoint that is down or in doubt

_PATHS = {
    "auto": ("/health", "/v1/models"),
    "vllm": ("/health",),
    "sglang": ("/health",),
    "llamacpp": ("/health",),
    "tgi": ("/health",),
    "ollama": ("/api/version",),
    "openai": ("/v1/models",),
}
_NO_SUCH_ROUTE = frozenset({404, 405, 501})


@attrs.frozen(kw_only=True)
class Probe:
    """How to ask one endpoint: the addresses to try, in order, and the key to show.

    :param origin: where connections go; the URLs only say what is asked there.
    :param root: where to find out what it is; empty if somebody has said that.
    """

    urls: tuple[str, ...]
    root: str
    headers: dict[str, str] = attrs.field(repr=False)  # the key is in them
    origin: Origin

    @classmethod
    def of(cls, url: str, engine: str, api_key: str | None, origin: Origin | None = None) -> Probe:
        usual, base = split_url(url)
        origin = origin or usual
        root = f"{origin.scheme}://{origin.authority.decode()}{base.removesuffix('/v1')}"
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        urls = tuple(root + path for path in _PATHS[engine])
        unknown = root if engine == "auto" else ""
        return cls(urls=urls, root=unknown, headers=headers, origin=origin)


class NothingLearnt(Exception):
    """The probe could not be made for want of something of our own, such as a descriptor."""


async def ask(
    client: httpx.AsyncClient,
    probe: Probe,
    within: float,
    on_server: Callable[[str], None] = lambda _: None,
) -> str | None:
    """What is wrong with the endpoint, or ``None`` if nothing is.

    :param on_server: told what the endpoint says it is.

    Raises :class:`NothingLearnt`.
    """
    try:
        with trio.fail_after(within):
            for url in probe.urls:
                status = await _status(client, url, probe, on_server)
                if status not in _NO_SUCH_ROUTE:
                    return _complaint(status)
    except trio.TooSlowError:
        return f"no answer within {within:g} s"
    except httpx.HTTPError as exc:
        if isinstance(exc.__cause__, OSError) and is_our_own_lack(exc.__cause__):
            raise NothingLearnt(str(exc)) from exc
        return str(exc) or type(exc).__name__
    return None  # it speaks HTTP, and has no health route to ask


async def _status(
    client: httpx.AsyncClient, url: str, probe: Probe, on_server: Callable[[str], None]
) -> int:
    asking = client.stream("GET", url, headers=probe.headers, extensions={ORIGIN: probe.origin})
    async with asking as response:
        if server := response.headers.get("server"):
            on_server(server)
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) <= _MOST_READ:
            async for _ in response.aiter_raw():
                pass  # its status says all, but read to its end the connection can be used again
        return response.status_code


def _complaint(status: int) -> str | None:
    match status:
        case _ if 200 <= status < 300:
            return None
        case 401 | 403:
            return f"it does not accept the gateway's key (status {status})"
        case 503:
            return "it is loading, or overloaded (status 503)"
        case _:
            return f"status {status}"


class Sharing(Protocol):
    """Those with whom the work of probing is shared."""

    def is_prober(self, endpoint: Endpoint) -> bool:
        """Whether it is ours to probe it; else others tell what they find."""

    def found(self, endpoint: Endpoint) -> None:
        """A probe of ours has had a result."""

    def suspects(self, endpoint: Endpoint) -> None:
        """Whoever probes it should do so now."""

    async def divide(self) -> None:
        """Find out who probes what."""

    async def wait_for(self, endpoints: Iterable[Endpoint]) -> None:
        """Until something is known of all of them."""


@attrs.define(eq=False)
class HealthChecker:
    """Watches one endpoint for as long as it runs.

    :param every: seconds between probes while all is well; sooner when it is not.
    :param within: seconds that a probe may take.
    :param on_flip: told when the endpoint becomes healthy or unhealthy.
    """

    endpoint: Endpoint
    probe: Probe
    client: httpx.AsyncClient
    every: float
    within: float
    on_flip: Callable[[Endpoint], None]
    jitter: Callable[[], float] = random.random
    sharing: Sharing | None = attrs.field(default=None, init=False)
    _doubt: trio.Event = attrs.field(factory=trio.Event, init=False)
    _is_another: bool = attrs.field(default=False, init=False)  # perhaps, than it was
    _due: float = attrs.field(default=math.inf, init=False)  # the next probe, or the one under way

    async def check(self) -> None:
        """One probe, whatever it finds."""
        try:
            error = await ask(self.client, self.probe, self.within, self._note_server)
        except NothingLearnt:
            return
        if self.endpoint.probed(error, trio.current_time()):
            self.on_flip(self.endpoint)
        if error is not None:
            self._is_another = True
        elif self.probe.root and (self.endpoint.engine is None or self._is_another):
            await self._recognise()
        if self.sharing is not None:
            self.sharing.found(self.endpoint)

    async def _recognise(self) -> None:
        """Ask once what it is; if that fails, again after the next probe that goes well."""
        probe = self.probe
        with trio.move_on_after(self.within), suppress(httpx.HTTPError):
            found = await recognise(self.client, probe.root, probe.headers, probe.origin)
            self.endpoint.engine, self._is_another = found, False

    def learn(self, error: str | None, *, healthy: bool) -> None:
        """Take over what somebody else has found."""
        if self.endpoint.told(error, healthy, trio.current_time()):
            self.on_flip(self.endpoint)

    def is_ours(self) -> bool:
        """Whether it is this gateway that probes the endpoint."""
        return self.sharing is None or self.sharing.is_prober(self.endpoint)

    def go_on_from(self, before: HealthChecker) -> None:
        """Probe when *before* would have, or sooner; at once if this asks in another way."""
        self._due, self._is_another = before._due, before._is_another
        if before._doubt.is_set() or before.probe != self.probe:
            self.suspect()

    def _note_server(self, server: str) -> None:
        if server == LLAMACPP_SERVER:
            self.endpoint.engine, self._is_another = "llamacpp", False

    async def watch(self) -> NoReturn:
        """Probe for ever, beginning one interval from now."""
        while True:
            soon = self.endpoint.health.in_doubt()
            pause = min(self.every, _SOON) if soon else self.every
            latest = trio.current_time() + pause * (0.9 + 0.2 * self.jitter())
            self._due = min(self._due, latest)
            with trio.move_on_at(self._due):
                await self._doubt.wait()
            self._doubt = trio.Event()
            if self.is_ours():
                await self.check()
            self._due = math.inf

    def suspect(self) -> None:
        """A request could not reach the endpoint: look at it now, not at the next interval."""
        self._is_another = True
        if self.sharing is not None and not self.is_ours():
            self.sharing.suspects(self.endpoint)
        else:
            self._doubt.set()


async def check_all(checkers: Sequence[HealthChecker], within: float) -> None:
    """Probe every endpoint at the same time; return when all are known, or after *within*."""
    with trio.move_on_after(within):
        async with trio.open_nursery() as nursery:
            for checker in checkers:
                nursery.start_soon(checker.check)
