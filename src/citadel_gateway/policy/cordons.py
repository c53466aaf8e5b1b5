"""Which endpoints an operator has taken out of service, remembered by name.

The name is remembered and not the endpoint, because an address that a name loses and gets back is
a new endpoint, and it must not come back into service by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import attrs

from citadel_gateway.policy.endpoint import Endpoint

Name: TypeAlias = "tuple[str, str]"
"""A model and a URL."""


@attrs.define
class Cordons:
    """By model and URL; the URL of a name stands for all its addresses."""

    names: set[Name] = attrs.field(factory=set)

    def apply(self, endpoint: Endpoint) -> None:
        """Cordon an endpoint that is new if somebody has asked for that."""
        if self.names and not self.names.isdisjoint(_names_of(endpoint)):
            endpoint.cordon()

    def cordon(self, url: str, endpoints: Iterable[Endpoint]) -> None:
        for endpoint in endpoints:
            self.names.add((endpoint.model, url))
            endpoint.cordon()

    def uncordon(
        self, endpoints: Iterable[Endpoint], others: Iterable[Endpoint], now: float
    ) -> None:
        """Of a name that was cordoned, those of its addresses that are not meant stay so.

        :param others: all endpoints that there are, or at least those.
        """
        for endpoint in endpoints:
            self.names.difference_update(_names_of(endpoint))
            endpoint.uncordon(now)
        for other in others:
            if other.cordoned and self.names.isdisjoint(_names_of(other)):
                self.names.add((other.model, other.url))

    def follow(
        self, said: Mapping[Name, bool], endpoints: Iterable[Endpoint], now: float
    ) -> list[Endpoint]:
        """Know of each name whether it is cordoned; returns of *endpoints* those that change."""
        self.names.update(name for name, is_cordoned in said.items() if is_cordoned)
        self.names.difference_update(name for name, cordoned in said.items() if not cordoned)
        changed = []
        for endpoint in endpoints:
            is_cordoned = not self.names.isdisjoint(_names_of(endpoint))
            if is_cordoned != endpoint.cordoned:
                changed.append(endpoint)
                if is_cordoned:
                    endpoint.cordon()
                else:
                    endpoint.uncordon(now)
        return changed


def is_called(endpoint: Endpoint, url: str) -> bool:
    """Whether *url* means *endpoint*, perhaps among others."""
    return url in {endpoint.url, _configured(endpoint)}


def _names_of(endpoint: Endpoint) -> set[Name]:
    return {(endpoint.model, endpoint.url), (endpoint.model, _configured(endpoint))}


def _configured(endpoint: Endpoint) -> str:
    """Its URL without the address that it has got as one of several."""
    return endpoint.url.partition(" [")[0]
