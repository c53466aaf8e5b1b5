"""Load and check a configuration: everything that is wrong with it, in one go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from citadel_gateway.config.environment import overlay
from citadel_gateway.config.schema import GatewayConfigSchema, ModelConfig, ServiceConfig
from citadel_gateway.config.structure import InvalidConfig, Problem, Steps, structure, suggestion

AUTO = "auto"


class ConfigError(Exception):
    """Everything wrong with a configuration, one line per problem."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n  ".join([head, *self.problems]))


def parse(
    raw: Mapping[str, object],
    *,
    source: str = "<dict>",
    environ: Mapping[str, str] | None = None,
) -> GatewayConfigSchema:
    """Check plain data.  Without *environ* it stands alone, whatever the process was given."""
    try:
        return _build(raw, environ or {})
    except InvalidConfig as exc:
        raise ConfigError(source, map(str, exc.problems)) from exc


def load_config(
    path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None
) -> GatewayConfigSchema:
    """Load a YAML file, with the process's environment variables laid over it."""
    source = os.fspath(path)
    text = _read(source)
    raw = _load_yaml(source, text)
    try:
        return _build(raw, os.environ if environ is None else environ)
    except InvalidConfig as exc:
        raise ConfigError(source, _with_lines(exc.problems, text)) from exc


def _build(raw: object, environ: Mapping[str, str]) -> GatewayConfigSchema:
    if not isinstance(raw, Mapping):
        raise InvalidConfig([Problem((), "the configuration is not a mapping of sections")])
    laid = overlay(raw, environ)
    problems = list(laid.problems)
    try:
        config = structure(laid.raw, environ)
        problems += _rules(config)
    except InvalidConfig as exc:
        problems += exc.problems
    if problems:
        raise InvalidConfig(map(laid.rename, problems))
    return config


# --- The file


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(source, [f"cannot be read: {exc.strerror}"]) from exc
    except ValueError as exc:  # not UTF-8, or a null byte in the path
        raise ConfigError(source, [f"cannot be read as UTF-8 text: {exc}"]) from exc


def _load_yaml(source: str, text: str) -> object:
    try:
        # Pure Python, for one and the same parser everywhere; it refuses duplicate keys.
        raw: object = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(source, [_explain(exc)]) from exc
    if raw is None:
        raise ConfigError(source, ["the file is empty; it needs at least a `models` section"])
    return raw


def _explain(exc: Exception) -> str:
    match exc:
        case DuplicateKeyError():
            # ruamel's own sentence repeats both values, which may be secrets.
            found = re.match(r'found duplicate key "(.*?)"', exc.problem or "")
            what = f"duplicate key {found[1]!r}" if found else "duplicate key"
        case MarkedYAMLError():
            what = " ".join(filter(None, (exc.context, exc.problem)))
        case RecursionError():
            return "not valid YAML: nested too deeply"
        case _:
            return f"not valid YAML: {' '.join(str(exc).split())}"
    mark = exc.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _with_lines(problems: Iterable[Problem], text: str) -> list[str]:
    """Add line numbers, which only the slower round-trip loader knows."""
    try:
        document = YAML(typ="rt").load(text)
    except (YAMLError, ValueError, RecursionError):
        document = None
    numbered = ((problem, _line(document, problem.path)) for problem in problems)
    return [f"{problem} (line {line})" if line else str(problem) for problem, line in numbered]


def _line(node: object, path: Steps) -> int | None:
    """The line of the deepest part of *path* that is in the file."""
    line = None
    for step in path:
        if isinstance(node, CommentedMap) and step in (node.lc.data or {}):
            line = node.lc.key(step)[0] + 1
        elif isinstance(node, CommentedSeq) and isinstance(step, int) and step < len(node):
            line = node.lc.item(step)[0] + 1
        else:
            break
        node = node[step]
    return line


# --- Rules that span fields


def _rules(config: GatewayConfigSchema) -> Iterator[Problem]:
    yield from _alias_rules(config)
    default = config.gateway.default_model
    aliases = {alias for model in config.models.values() for alias in model.aliases}
    if default is not None and default not in aliases:
        yield from _must_be_models(config, ("gateway", "default_model"), [default])
    for name, model in config.models.items():
        yield from _model_rules(config, name, model)
    yield from _key_rules(config)
    yield from _listener_rules(config)
    origins = config.security.cors.allow_origins
    if "*" in origins and len(origins) > 1:
        yield Problem(("security", "cors", "allow_origins"), "'*' already allows all the others")


def _alias_rules(config: GatewayConfigSchema) -> Iterator[Problem]:
    if AUTO in config.models:
        yield Problem(("models", AUTO), "'auto' is reserved for requests that leave the choice")
    owners: dict[str, str] = {}
    for name, model in config.models.items():
        for index, alias in enumerate(model.aliases):
            path = ("models", name, "aliases", index)
            if alias == AUTO:
                yield Problem(path, "'auto' is reserved for requests that leave the choice")
            elif alias in config.models:
                yield Problem(path, f"{alias!r} is the name of a model")
            elif alias in owners:
                yield Problem(path, f"{alias!r} is already an alias of {owners[alias]!r}")
            owners.setdefault(alias, name)


def _must_be_models(
    config: GatewayConfigSchema, path: Steps, names: Iterable[str]
) -> Iterator[Problem]:
    for name in names:
        if name not in config.models:
            hint = suggestion(name, config.models) or f"; models: {', '.join(config.models)}"
            yield Problem(path, f"{name!r} is not a model{hint}")


def _model_rules(config: GatewayConfigSchema, name: str, model: ModelConfig) -> Iterator[Problem]:
    path = ("models", name)
    if not model.all_endpoints():
        yield Problem(path, "needs `endpoint` or `endpoints`")
    seen = {model.endpoint}
    for index, endpoint in enumerate(model.endpoints):
        if endpoint.url in seen:
            yield Problem((*path, "endpoints", index, "url"), f"{endpoint.url} is there twice")
        seen.add(endpoint.url)
    for index, fallback in enumerate(model.fallbacks):
        where = (*path, "fallbacks", index)
        if fallback == name:
            yield Problem(where, "a model cannot be its own fallback")
        yield from _must_be_models(config, where, [fallback])


def _key_rules(config: GatewayConfigSchema) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, key in enumerate(config.security.api_keys):
        path = ("security", "api_keys", index)
        if key.id in seen:
            yield Problem((*path, "id"), f"{key.id!r} is there twice")
        seen.add(key.id)
        for place, model in enumerate(key.allowed_models):
            yield from _must_be_models(config, (*path, "allowed_models", place), [model])


def _listener_rules(config: GatewayConfigSchema) -> Iterator[Problem]:
    service, monitoring = config.service, config.monitoring
    yield from _tls_rules(service)
    port = monitoring.prometheus_port
    if port and port == service.port and _overlap(service.host, monitoring.prometheus_host):
        yield Problem(
            ("monitoring", "prometheus_port"), f"{port} is service.port, too, on the same host"
        )
    if monitoring.metrics_endpoint == monitoring.health_check_endpoint:
        yield Problem(("monitoring", "metrics_endpoint"), "is the health_check_endpoint, too")


def _tls_rules(service: ServiceConfig) -> Iterator[Problem]:
    if service.tls_certfile and not service.tls_keyfile:
        yield Problem(("service", "tls_keyfile"), "is required with tls_certfile")
    if service.tls_keyfile and not service.tls_certfile:
        yield Problem(("service", "tls_certfile"), "is required with tls_keyfile")


def _overlap(one: str, other: str) -> bool:
    """Whether two addresses could fight for a port: a wildcard covers all the others."""
    return one == other or _is_wildcard(one) or _is_wildcard(other)


def _is_wildcard(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:  # a host name
        return False
