"""Where the endpoints of a model are, by everything that may say so.

Theory of operation.  A source is whatever lists endpoints: the configuration, a file, an operator,
a name.  What each has last said is known without waiting, and outlives the configuration that asked
for it.  The lists are laid over each other, in that order, and who is named first counts; so an
endpoint that two sources list stays until the last of them has dropped it.  Sources that fail have
still said what they last said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import attrs
import trio

from citadel_gateway.app.additions import Additions
from citadel_gateway.app.upstreams import Place
from citadel_gateway.config.schema import EndpointConfig, ModelConfig
from citadel_gateway.config.values import Resolve
from citadel_gateway.io.endpoint_files import EndpointFiles
from citadel_gateway.io.logs import redact
from citadel_gateway.io.resolver import Resolver, is_address
from citadel_gateway.io.target import split_url

Json = dict[str, Any]


def _whole(endpoint: EndpointConfig) -> EndpointConfig:
    return endpoint


@attrs.define(eq=False)
class Discovery:
    """What the sources of all models have last said.

    :param portion: this process's part of the limits that an endpoint has by itself.
    """

    resolver: Resolver
    files: EndpointFiles = attrs.field(factory=EndpointFiles)
    additions: Additions = attrs.field(factory=Additions)
    portion: Callable[[EndpointConfig], EndpointConfig] = _whole

    def places(self, model: str, config: ModelConfig) -> dict[str, Place]:
        """Of all endpoints of a model that are known now, by name; never waits."""
        places: dict[str, Place] = {}
        for endpoint in self._endpoints(model, config):
            for place in self._places_of(endpoint):
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
            for host in self.hosts(model, config):
                nursery.start_soon(partial(self._look_up, host, found))

    def hosts(self, model: str, config: ModelConfig) -> set[str]:
        """The names of which a model's endpoints are the addresses."""
        return {
            split_url(endpoint.url)[0].host
            for endpoint in self._endpoints(model, config)
            if _is_to_be_looked_up(endpoint)
        }

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
        for host in sorted(self.hosts(model, config)):
            trouble = self.resolver.trouble(host)
            problems = [] if trouble is None else [str(trouble)]
            reports.append(_report("dns", host, len(self.resolver.known(host)), problems))
        return reports

    def forget_others(self, models: Iterable[tuple[str, ModelConfig]], hosts: set[str]) -> None:
        """Ask no longer for what no living configuration wants.

        :param hosts: names that somebody may connect to.
        """
        self.resolver.forget_others(hosts)
        self.files.forget_others(
            {(m, c.endpoints_file) for m, c in models if c.endpoints_file is not None}
        )

    async def _look_up(self, host: str, found: Callable[[], None]) -> None:
        try:
            await self.resolver.addresses(host)
        except OSError:
            return  # it is asked for again in the background
        found()

    def _endpoints(self, model: str, config: ModelConfig) -> Iterator[EndpointConfig]:
        yield from config.all_endpoints()
        if config.endpoints_file is not None:
            for endpoint in self.files.known(model, config.endpoints_file):
                yield config.complete(self.portion(endpoint))
        for endpoint in self.additions.of(model, config):
            yield config.complete(self.portion(endpoint))

    def _places_of(self, endpoint: EndpointConfig) -> Iterator[Place]:
        if _is_to_be_looked_up(endpoint):
            for address in self.resolver.known(split_url(endpoint.url)[0].host):
                yield Place(f"{endpoint.url} [{address}]", endpoint, address)
        else:
            yield Place(endpoint.url, endpoint)


def _is_to_be_looked_up(endpoint: EndpointConfig) -> bool:
    """Whether it stands for several, of which a name server tells."""
    if endpoint.resolve is not Resolve.EACH:
        return False
    origin, _ = split_url(endpoint.url)
    return not origin.socket and not is_address(origin.host)


def _report(kind: str, name: str, endpoints: int, problems: list[str]) -> Json:
    return {"source": kind, "name": name, "endpoints": endpoints, "problems": problems}
