"""Where the endpoints of a model are, by everything that may say so.

Theory of operation.  A source is whatever lists endpoints: the configuration, a file, an operator,
a backend, a name.  What each has last said is known without waiting, and outlives the configuration
that asked for it.  The lists are laid over each other, in that order, and who is named first
counts; so an endpoint that two sources list stays until the last of them has dropped it.  Sources
that fail have still said what they last said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import attrs
import trio

from citadel_gateway.app.additions import Additions
from citadel_gateway.app.upstreams import Place
from citadel_gateway.config.schema import EndpointConfig, GatewayConfigSchema, ModelConfig
from citadel_gateway.config.values import Count, Name, Resolve, Url, Weight
from citadel_gateway.io.catalogue import Catalogue
from citadel_gateway.io.endpoint_files import EndpointFiles
from citadel_gateway.io.logs import redact
from citadel_gateway.io.resolver import Resolver, is_address
from citadel_gateway.io.service_lookup import make_service_lookup
from citadel_gateway.io.target import split_url
from citadel_gateway.policy.services import Choice, Service, in_use, read_service

Json = dict[str, Any]


def _whole(endpoint: EndpointConfig) -> EndpointConfig:
    return endpoint


@attrs.frozen
class _Configured:
    """What the configuration alone says of a model's endpoints.

    :param places: of those that are where their URLs say, which are most.
    :param for_several: those that are to be looked up.
    """

    config: ModelConfig
    places: dict[str, Place]
    for_several: tuple[EndpointConfig, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> _Configured:
        listed = config.all_endpoints()
        several = tuple(filter(_is_to_be_looked_up, listed))
        single = [Place(e.url, e) for e in listed if e not in several]
        return cls(config, {place.name: place for place in single}, several)


@attrs.define(eq=False)
class Discovery:
    """What the sources of all models have last said.

    :param services: knows the SRV records of names, in presentation format.
    :param catalogue: knows what backends list, if there can be any.
    :param portion: this process's part of the limits that an endpoint has by itself.
    """

    resolver: Resolver
    services: Resolver = attrs.field(factory=lambda: Resolver(lookup=make_service_lookup()))
    files: EndpointFiles = attrs.field(factory=EndpointFiles)
    catalogue: Catalogue | None = None
    additions: Additions = attrs.field(factory=Additions)
    portion: Callable[[EndpointConfig], EndpointConfig] = _whole
    _configured: dict[str, _Configured] = attrs.field(factory=dict, init=False)

    def places(
        self, model: str, config: ModelConfig, is_down: Callable[[str], bool]
    ) -> dict[str, Place]:
        """Of all endpoints of a model that are to be used now, by name; never waits.

        :param is_down: whether the endpoint with that name is there, and of no use.
        """
        places = {**self._configured_of(model, config).places}
        for endpoint in self._others(model, config):
            for place in self._places_of(endpoint, is_down):
                places.setdefault(place.name, place)
        return places

    async def look(
        self, model: str, config: ModelConfig, found: Callable[[], None] = lambda: None
    ) -> None:
        """Ask all sources of a model that have not said anything yet.

        :param found: called whenever more is known.
        """
        if config.endpoints_file is not None:
            await self.files.look(model, config.endpoints_file, config)
            found()
        async with trio.open_nursery() as nursery:
            for resolver, host in self._names(model, config):
                nursery.start_soon(partial(_look_up, resolver, host, found))

    def hosts(self, model: str, config: ModelConfig) -> set[str]:
        """The names that stand for a model's endpoints."""
        return {host for _, host in self._names(model, config)}

    def report(self, model: str, config: ModelConfig) -> list[Json]:
        """For ``/models/status``: the sources of a model besides its configuration."""
        reports = []
        if (path := config.endpoints_file) is not None:
            problems = [redact(problem) for problem in self.files.problems(model, path)]
            reports.append(_report("file", path, len(self.files.known(model, path)), problems))
        added = self.additions.of(model, config)
        unused = self.additions.problems(model, config)
        if added or unused:
            reports.append(_report("order", "added", len(added), unused))
        if self.catalogue is not None:
            for url, problem in self.catalogue.report(config.upstream_model or model):
                reports.append(_report("backend", url, 1, [] if problem is None else [problem]))
        for resolver, host in self._names(model, config):
            trouble = resolver.trouble(host)
            problems = [] if trouble is None else [str(trouble)]
            kind = "dns" if resolver is self.resolver else "srv"
            reports.append(_report(kind, host, len(resolver.known(host)), problems))
        return reports

    def forget_others(self, models: Iterable[tuple[str, ModelConfig]], hosts: set[str]) -> None:
        """Ask no longer for what no living configuration wants.

        :param hosts: names that somebody may connect to.
        """
        models = [*models]
        for gone in self._configured.keys() - {model for model, _ in models}:
            del self._configured[gone]
        self.resolver.forget_others(hosts)
        self.services.forget_others(hosts)
        self.files.forget_others(
            {(m, c.endpoints_file) for m, c in models if c.endpoints_file is not None}
        )

    def _names(self, model: str, config: ModelConfig) -> list[tuple[Resolver, str]]:
        """What is to be looked up, and where, each once."""
        found: dict[tuple[bool, str], tuple[Resolver, str]] = {}
        for endpoint in self._others(model, config):
            if _is_to_be_looked_up(endpoint):
                is_srv, host = endpoint.resolve is Resolve.SRV, split_url(endpoint.url)[0].host
                found[is_srv, host] = (self.services if is_srv else self.resolver, host)
        return [*found.values()]

    def _configured_of(self, model: str, config: ModelConfig) -> _Configured:
        """Kept, as it is asked for with every page of metrics."""
        known = self._configured.get(model)
        if known is None or known.config is not config:
            known = self._configured[model] = _Configured.of(config)
        return known

    def _others(self, model: str, config: ModelConfig) -> Iterator[EndpointConfig]:
        """All that may come and go."""
        yield from self._configured_of(model, config).for_several
        if config.endpoints_file is not None:
            for endpoint in self.files.known(model, config.endpoints_file):
                yield config.complete(self.portion(endpoint))
        for endpoint in (*self.additions.of(model, config), *self._backends(model, config)):
            yield config.complete(self.portion(endpoint))

    def _backends(self, model: str, config: ModelConfig) -> list[EndpointConfig]:
        if self.catalogue is None:
            return []
        listed = self.catalogue.serving(config.upstream_model or model)
        return [attrs.evolve(backend, resolve=Resolve.TOGETHER) for backend in listed]

    def _portion_of(self, most: Count) -> Count:
        return self.portion(EndpointConfig(url=Url(""), max_concurrent=most)).max_concurrent or most

    def lay_over(self, config: GatewayConfigSchema) -> GatewayConfigSchema:
        """*config* with the models that only backends list.

        A name by which a configured model is known, or its engines know it, is that model.
        """
        names = [] if self.catalogue is None else self.catalogue.names()
        taken = {*config.models}
        for model in config.models.values():
            taken |= {*model.aliases}
            if model.upstream_model is not None:
                taken.add(model.upstream_model)
        own = ModelConfig(max_concurrent=self._portion_of(ModelConfig().max_concurrent))
        found = {Name(name): own for name in names if name not in taken}
        return attrs.evolve(config, models={**config.models, **found}) if found else config

    def _places_of(
        self, endpoint: EndpointConfig, is_down: Callable[[str], bool]
    ) -> Iterator[Place]:
        if not _is_to_be_looked_up(endpoint):
            yield Place(endpoint.url, endpoint)
            return
        host = split_url(endpoint.url)[0].host
        if endpoint.resolve is Resolve.EACH:
            for address in self.resolver.known(host):
                yield Place(f"{endpoint.url} [{address}]", endpoint, address)
            return

        def name_of(service: Service) -> str:
            return f"{endpoint.url} [{service.authority}]"

        read = map(read_service, self.services.known(host))
        services = [service for service in read if service is not None]
        for choice in in_use(services, lambda s: is_down(name_of(s))):
            at = _at(choice, endpoint)
            yield Place(name_of(choice.service), at, None, choice.is_stood_in_for)


def _at(choice: Choice, endpoint: EndpointConfig) -> EndpointConfig:
    """The endpoint at the server that a record names."""
    parts = urlsplit(endpoint.url)
    url = urlunsplit(parts._replace(netloc=choice.service.authority))
    weight = Weight((endpoint.weight or 1.0) * choice.weight)
    return attrs.evolve(endpoint, url=Url(url), weight=weight)


async def _look_up(resolver: Resolver, host: str, found: Callable[[], None]) -> None:
    try:
        await resolver.addresses(host)
    except OSError:
        return  # it is asked for again in the background
    found()


def _is_to_be_looked_up(endpoint: EndpointConfig) -> bool:
    """Whether it stands for several, of which a name server tells."""
    if endpoint.resolve not in (Resolve.EACH, Resolve.SRV):
        return False
    origin, _ = split_url(endpoint.url)
    return not origin.socket and not is_address(origin.host)


def _report(kind: str, name: str, endpoints: int, problems: list[str]) -> Json:
    return {"source": kind, "name": name, "endpoints": endpoints, "problems": problems}
