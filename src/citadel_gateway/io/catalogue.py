"""Which models backends say that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import attrs
import httpx
import trio

from citadel_gateway.config.schema import EndpointConfig
from citadel_gateway.io.recognition import get_small
from citadel_gateway.io.target import split_url
from citadel_gateway.wire.model_list import read_model_names

_AUTO = "auto"  # means that a client leaves the choice


@attrs.define(eq=False)
class _Backend:
    """:param names: what it last listed; ``None`` before it has listed anything."""

    config: EndpointConfig
    names: dict[str, None] | None = None
    problem: str | None = None


@attrs.define(eq=False)
class Catalogue:
    """Asks every backend for its models, again and again; who does not answer keeps them.

    :param every: seconds between two rounds.
    :param within: seconds that an answer may take.
    :param on_change: told of a backend that lists others than before.
    :param on_trouble: told why a backend's list cannot be had, and (``None``) that it can again.
    """

    client: httpx.AsyncClient
    every: float = 10.0
    within: float = 2.0
    on_change: Callable[[str], None] = lambda _url: None
    on_trouble: Callable[[str, str | None], None] = lambda _url, _problem: None
    _backends: dict[str, _Backend] = attrs.field(factory=dict, init=False)
    _asked: trio.Event = attrs.field(factory=trio.Event, init=False)

    def follow(self, backends: Iterable[EndpointConfig]) -> None:
        """Know these from now on; what others have listed is forgotten."""
        known, self._backends = self._backends, {}
        for config in backends:
            before = known.get(config.url)
            backend = self._backends[config.url] = _Backend(config)
            if before is not None:
                backend.names, backend.problem = before.names, before.problem
        self._asked.set()

    def names(self) -> list[str]:
        """Of all models that any backend lists."""
        found = (name for backend in self._backends.values() for name in backend.names or ())
        return list(dict.fromkeys(found))

    def serving(self, name: str) -> list[EndpointConfig]:
        """The backends that list a model."""
        return [b.config for b in self._backends.values() if name in (b.names or ())]

    def report(self, name: str) -> list[tuple[str, str | None]]:
        """URLs of the backends that list a model, and why that may be old."""
        return [
            (b.config.url, b.problem) for b in self._backends.values() if name in (b.names or ())
        ]

    async def look(self) -> None:
        """Ask all, once."""
        await self._ask_all([*self._backends.values()])

    async def look_at_new(self) -> None:
        """Ask those that have not said anything yet."""
        await self._ask_all([b for b in self._backends.values() if b.names is None])

    async def _ask_all(self, backends: Iterable[_Backend]) -> None:
        async with trio.open_nursery() as nursery:
            for backend in backends:
                nursery.start_soon(self._ask, backend)

    async def run(self) -> NoReturn:
        while True:
            with trio.move_on_after(self.every):
                await self._asked.wait()
            self._asked = trio.Event()
            await self.look()

    async def _ask(self, backend: _Backend) -> None:
        names, problem = backend.names, None
        try:
            with trio.fail_after(self.within):
                names = await self._list(backend.config)
        except trio.TooSlowError:
            problem = f"no list of models within {self.within:g} s"
        except (httpx.HTTPError, ValueError) as exc:
            problem = f"no list of models: {str(exc) or type(exc).__name__}"
        if (problem is None) != (backend.problem is None):
            self.on_trouble(backend.config.url, problem)
        backend.problem = problem
        if names != backend.names:
            backend.names = names
            self.on_change(backend.config.url)

    async def _list(self, config: EndpointConfig) -> dict[str, None]:
        origin, base = split_url(config.url)
        if origin.scheme == "https":
            origin = attrs.evolve(origin, tls=config.tls)
        root = f"{origin.scheme}://{origin.authority.decode()}{base.removesuffix('/v1')}"
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        body = await get_small(self.client, f"{root}/v1/models", headers, origin)
        if not body:
            raise ValueError("its answer has another status than 200, or is too long")
        return dict.fromkeys(name for name in read_model_names(body) if name != _AUTO)
