"""Endpoints that an operator has added to models while the gateway runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from citadel_gateway.config.endpoint_list import parse_addition
from citadel_gateway.config.problems import InvalidConfig
from citadel_gateway.config.schema import EndpointConfig, ModelConfig

Options = Mapping[str, Any]


@attrs.frozen
class _Read:
    """What was written, as it is for a model as it was then configured."""

    model: ModelConfig
    endpoint: EndpointConfig | None
    problems: tuple[str, ...]


@attrs.define(eq=False)
class Additions:
    """By model and URL, until they are removed or the process ends, whatever is configured.

    They are kept as they were written: that is what other workers are told, and a model that is
    configured otherwise later may make something else of it, or nothing.
    """

    _written: dict[tuple[str, str], Options] = attrs.field(factory=dict, init=False)
    _read: dict[tuple[str, str], _Read] = attrs.field(factory=dict, init=False)

    def put(self, model: str, url: str, options: Options) -> None:
        """Add it, or let it be as is said now."""
        self.drop(model, url)
        self._written[model, url] = options

    def drop(self, model: str, url: str) -> None:
        self._written.pop((model, url), None)
        self._read.pop((model, url), None)

    def of(self, model: str, config: ModelConfig) -> list[EndpointConfig]:
        return [r.endpoint for r in self._of(model, config) if r.endpoint is not None]

    def problems(self, model: str, config: ModelConfig) -> list[str]:
        """Why some are not used."""
        return [problem for read in self._of(model, config) for problem in read.problems]

    def models_with(self, url: str) -> list[str]:
        """The models to which an endpoint with that URL was added."""
        return [model for model, added in self._written if added == url]

    def written(self) -> Iterable[tuple[str, str, Options]]:
        """Models, URLs, and what was written of them."""
        return [(model, url, options) for (model, url), options in self._written.items()]

    def _of(self, model: str, config: ModelConfig) -> list[_Read]:
        reads = []
        for (of, url), options in self._written.items():
            if of != model:
                continue
            read = self._read.get((model, url))
            if read is None or read.model != config:
                read = self._read[model, url] = _read(url, options, config)
            reads.append(read)
        return reads


def _read(url: str, options: Options, config: ModelConfig) -> _Read:
    try:
        return _Read(config, parse_addition({**options, "url": url}, config), ())
    except InvalidConfig as exc:
        return _Read(config, None, tuple(f"{url}: {problem}" for problem in exc.problems))
