"""Which configuration is in use, and how another one takes its place.

Another one comes from the file, from whoever holds the service, or because backends list other
models; one at a time.  See :mod:`citadel_gateway.app.generation` for what a change means to the
requests that are running.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import attrs
import trio

from citadel_gateway.app.discovery import Discovery
from citadel_gateway.app.generation import Generation
from citadel_gateway.app.tls_files import TlsFiles, load_tls_files
from citadel_gateway.config.restart import keep_what_is_fixed
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.io.catalogue import Catalogue
from citadel_gateway.io.logs import JsonLog

FIRST_ROUND = 1.5  # seconds that first probes and lists may hold up the start, or a change


@attrs.define(eq=False, kw_only=True)
class Succession:
    """The generations of one gateway, from the first.

    :param base: the configuration without the models that only backends list.
    :param digest: SHA-256 of the file that it came from.
    :param make: all that is made from a configuration; given the previous generation, if any.
    :param on_change: told of the generation that is the current one now, and of the one that was,
        to renew what is made from the configuration and belongs to no generation.
    """

    base: GatewayConfigSchema
    digest: str
    make: Callable[[GatewayConfigSchema, str, Generation | None], Generation]
    on_change: Callable[[Generation, Generation, TlsFiles], None]
    on_crash: Callable[[str, Exception], None]
    discovery: Discovery
    catalogue: Catalogue
    log: JsonLog
    current: Generation = attrs.field(init=False)
    living: list[Generation] = attrs.field(init=False)  # those with requests, the current one last
    _nursery: trio.Nursery | None = attrs.field(default=None, init=False)
    _coming: Generation | None = attrs.field(default=None, init=False)  # about to be the current
    _changing: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _other_models: trio.Event = attrs.field(factory=trio.Event, init=False)

    def __attrs_post_init__(self) -> None:
        self.catalogue.on_change = self._note_listing
        self._follow_backends(self.base)
        self.current = self.make(self.base, self.digest, None)
        self.living = [self.current]

    async def begin(self, nursery: trio.Nursery) -> None:
        """Have the current generation at work in *nursery*, with the models that backends list."""
        nursery.start_soon(self._run, self.current)
        self._nursery = nursery
        await self._take_in_models(joins=False)

    def end(self) -> None:
        """There is no change from now on."""
        self._nursery = None

    async def adopt(self, config: GatewayConfigSchema, digest: str) -> None:
        """Serve by *config* from now on.

        Endpoints that are new are probed before it counts.  Raises ``ConfigError``, and then has
        changed nothing.
        """
        async with self._changing:
            if self._nursery is None:
                raise RuntimeError("the gateway is not open")
            base, kept = keep_what_is_fixed(self.base, config)
            tls = await load_tls_files(base)
            self._follow_backends(base)
            try:
                with trio.move_on_after(FIRST_ROUND):
                    await self.catalogue.look_at_new()
                await self._make_way(self._nursery, base, tls, digest)
            finally:
                self._follow_backends(self.base)
            for what in kept:
                self.log.event(logging.WARNING, "needs a restart", problem=what)

    async def watch_models(self) -> None:
        """Have the models that backends list, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.catalogue.run)
            while True:
                await self._other_models.wait()
                self._other_models = trio.Event()
                await self._take_in_models()

    async def _take_in_models(self, *, joins: bool = True) -> None:
        """Serve the models that backends list now, and no others but the configured ones.

        That is done as for another configuration, so that requests end with what they began with.

        :param joins: the endpoints of new models start slowly.
        """
        async with self._changing:
            wanted = self.discovery.lay_over(self.base).models
            if self._nursery is None or wanted.keys() == self.current.balancer.models.keys():
                return
            tls = await load_tls_files(self.base)
            await self._make_way(self._nursery, self.base, tls, self.current.digest, joins=joins)

    async def _make_way(
        self,
        nursery: trio.Nursery,
        base: GatewayConfigSchema,
        tls: TlsFiles,
        digest: str,
        *,
        joins: bool = True,
    ) -> None:
        """Let the next generation be the current one, once what is new in it has been probed."""
        previous = self.current
        generation = self.make(self.discovery.lay_over(base), digest, previous)
        if base is self.base:  # it is the models of the backends that are others
            generation.number, generation.since = previous.number, previous.since
        self._coming = generation
        try:
            await generation.watch.look_at_new(previous.watch, FIRST_ROUND, joins=joins)
            self._succeed(nursery, generation, previous, tls)
            self.base = base
        finally:
            self._coming = None

    def _succeed(
        self, nursery: trio.Nursery, generation: Generation, previous: Generation, tls: TlsFiles
    ) -> None:
        """Let *generation* be the current one.  Waits for nobody."""
        before = {u.endpoint.url for u in previous.balancer.upstreams}
        generation.take_over(previous, trio.current_time())
        self.current = generation
        self.living.append(generation)
        nursery.start_soon(self._run, generation)
        self.on_change(generation, previous, tls)
        previous.retire()
        after = {u.endpoint.url for u in generation.balancer.upstreams}
        self.log.event(
            logging.INFO,
            "models" if generation.number == previous.number else "configuration",
            generation=generation.number,
            sha256=generation.digest or None,
            added=sorted(after - before),
            removed=sorted(before - after),
        )

    async def _run(self, generation: Generation) -> None:
        await generation.run(self.on_crash)
        self.living.remove(generation)
        generation.dissolve(self.living)
        used = [g.balancer for g in (*self.living, self._coming) if g is not None]
        self.discovery.forget_others(
            ((m.id, m.config) for balancer in used for m in balancer.models.values()),
            {host for balancer in used for host in balancer.hosts},
        )

    def _follow_backends(self, config: GatewayConfigSchema) -> None:
        self.catalogue.every = config.load_balancer.models_interval
        self.catalogue.within = config.load_balancer.health_check_timeout
        self.catalogue.follow(config.backends)

    def _note_listing(self, url: str) -> None:
        self.current.watch.note_change(url)
        self._other_models.set()

    def report(self) -> dict[str, Any]:
        """What there is to say of the configuration in use; ``since`` in seconds since 1970."""
        return {
            "generation": self.current.number,
            "since": self.current.since,
            "sha256": self.current.digest or None,
            "older_in_use": len(self.living) - 1,
        }
