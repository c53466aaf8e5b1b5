"""Endpoints of a model that stand outside the configuration, checked like those inside it."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import orjson

from citadel_gateway.config.loader import ConfigError, load_yaml, read_text, with_lines
from citadel_gateway.config.problems import InvalidConfig, Problem
from citadel_gateway.config.rules import endpoint_problems
from citadel_gateway.config.schema import EndpointConfig, ModelConfig
from citadel_gateway.config.structure import structure_endpoints


def parse_endpoints(
    raw: object, model: ModelConfig, environ: Mapping[str, str]
) -> tuple[EndpointConfig, ...]:
    """Endpoints of *model* from plain data.  Raises :class:`InvalidConfig`."""
    listed = structure_endpoints(raw, environ)
    alone = attrs.evolve(model, endpoint=None, endpoints=listed)
    if problems := [*endpoint_problems(("endpoints",), alone)]:
        raise InvalidConfig(Problem(problem.path[1:], problem.message) for problem in problems)
    return listed


def parse_addition(raw: Mapping[str, object], model: ModelConfig) -> EndpointConfig:
    """One more endpoint of *model*.  Raises :class:`InvalidConfig`.

    Credentials are the model's: whoever adds it need not be allowed to read what `env:` and
    `file:` and the paths of certificates name.
    """
    if theirs := [Problem((name,), "is the model's") for name in ("api_key", "tls") if name in raw]:
        raise InvalidConfig(theirs)
    try:
        (endpoint,) = parse_endpoints([raw], model, {})
    except InvalidConfig as exc:
        raise InvalidConfig(Problem(p.path[1:], p.message) for p in exc.problems) from exc
    return endpoint


def load_endpoints(
    text: str, *, source: str, model: ModelConfig, environ: Mapping[str, str]
) -> tuple[EndpointConfig, ...]:
    """The same from the text of a file, which is YAML or JSON.  Raises :class:`ConfigError`."""
    raw = _load(source, text)
    if raw is None:
        raise ConfigError(source, ["the file is empty; a list without endpoints is []"])
    try:
        return parse_endpoints(raw, model, environ)
    except InvalidConfig as exc:
        raise ConfigError(source, with_lines(exc.problems, text)) from exc


def read_endpoints(
    path: str, model: ModelConfig, environ: Mapping[str, str]
) -> tuple[EndpointConfig, ...]:
    """The same from the file at *path*.  Raises :class:`ConfigError`."""
    return load_endpoints(read_text(path), source=path, model=model, environ=environ)


def _load(source: str, text: str) -> object:
    """JSON is YAML, too, and read a hundred times as fast."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return load_yaml(source, text)
