"""Rules that span fields; they see only fields that are right by themselves."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from citadel_gateway.config.problems import Problem, Steps, suggestion
from citadel_gateway.config.schema import (
    GatewayConfigSchema,
    ModelConfig,
    ServiceConfig,
    StoreConfig,
    TlsConfig,
)
from citadel_gateway.config.store_url import Topology, parse_store_url
from citadel_gateway.config.values import Count, Resolve, RetryAmbiguous, StoreKind, Url

AUTO = "auto"


def cross_field_problems(config: GatewayConfigSchema) -> Iterator[Problem]:
    yield from _alias_rules(config)
    default = config.gateway.default_model
    aliases = {alias for model in config.models.values() for alias in model.aliases}
    if default is not None and default not in aliases:
        yield from _must_be_models(config, ("gateway", "default_model"), [default])
    for name, model in config.models.items():
        yield from _model_rules(config, name, model)
    yield from _backend_rules(config)
    yield from _key_rules(config)
    yield from _listener_rules(config)
    yield from _store_rules(config.store)
    performance = config.performance
    if (room := performance.max_buffered_bytes) and room < performance.max_body_bytes:
        path = ("performance", "max_buffered_bytes")
        yield Problem(path, f"one body may have {performance.max_body_bytes} (max_body_bytes)")
    is_shared = config.store.kind in (StoreKind.LMDB, StoreKind.REDIS)
    if is_shared and not config.load_balancer.queue_size:
        path = ("load_balancer", "queue_size")
        yield Problem(path, "must be at least 1 with a store, for which requests may wait")
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
        if name not in config.models and not config.backends:  # which may list it
            hint = suggestion(name, config.models) or f"; models: {', '.join(config.models)}"
            yield Problem(path, f"{name!r} is not a model{hint}")


def _model_rules(config: GatewayConfigSchema, name: str, model: ModelConfig) -> Iterator[Problem]:
    path = ("models", name)
    if not model.all_endpoints() and not model.endpoints_file and not config.backends:
        yield Problem(path, "needs `endpoint`, `endpoints` or `endpoints_file`")
    if model.min_concurrent is not None and model.min_concurrent > model.max_concurrent:
        yield _too_many((*path, "min_concurrent"), model.min_concurrent, model.max_concurrent)
    urls = [e.url for e in model.all_endpoints()]
    if model.endpoints_file is None and not config.backends:
        yield from _reach_rules(path, model.tls, model.resolve, urls)
    elif model.tls != TlsConfig():
        yield from _file_rules((*path, "tls"), model.tls)
    yield from endpoint_problems((*path, "endpoints"), model)
    if model.hedge and config.load_balancer.retry_ambiguous is RetryAmbiguous.NEVER:
        yield Problem(
            (*path, "hedge"), "sends requests twice, which retry_ambiguous: never rules out"
        )
    if model.hedge_after is not None and not model.hedge:
        yield Problem((*path, "hedge_after"), "needs `hedge: true`")
    for index, fallback in enumerate(model.fallbacks):
        where = (*path, "fallbacks", index)
        if fallback == name:
            yield Problem(where, "a model cannot be its own fallback")
        yield from _must_be_models(config, where, [fallback])


def _backend_rules(config: GatewayConfigSchema) -> Iterator[Problem]:
    if not config.models and not config.backends:
        yield Problem(("models",), "is required")
    yield from endpoint_problems(("backends",), ModelConfig(endpoints=config.backends))
    for index, backend in enumerate(config.backends):
        if backend.resolve not in (None, Resolve.TOGETHER):
            path = ("backends", index, "resolve")
            yield Problem(path, "a backend is one server, so it is 'together'")


def endpoint_problems(path: Steps, model: ModelConfig) -> Iterator[Problem]:
    """What is wrong with the endpoints that are listed, at *path*, for *model*."""
    seen = {model.endpoint}
    for index, endpoint in enumerate(model.endpoints):
        where = (*path, index)
        if endpoint.url in seen:
            yield Problem((*where, "url"), f"{endpoint.url} is there twice")
        seen.add(endpoint.url)
        least = endpoint.min_concurrent or model.min_concurrent
        most = endpoint.max_concurrent or model.max_concurrent
        is_own = endpoint.min_concurrent is not None or endpoint.max_concurrent is not None
        if is_own and least is not None and least > most:
            yield _too_many((*where, "min_concurrent"), least, most)
        tls = endpoint.tls or TlsConfig()
        yield from _reach_rules(where, tls, endpoint.resolve, [endpoint.url])


def _too_many(path: Steps, least: Count, most: Count) -> Problem:
    return Problem(path, f"{least} is more than max_concurrent, {most}")


def _reach_rules(
    path: Steps, tls: TlsConfig, resolve: Resolve | None, urls: Sequence[Url]
) -> Iterator[Problem]:
    """TLS is for https, and only names have addresses."""
    if tls != TlsConfig():
        if not any(url.startswith("https:") for url in urls):
            yield Problem((*path, "tls"), "needs a URL that begins with https://")
        yield from _file_rules((*path, "tls"), tls)
    if resolve in (Resolve.EACH, Resolve.SRV) and urls:
        how = (*path, "resolve")
        if not any(map(_has_name, urls)):
            yield Problem(how, f"{resolve.value!r} needs a URL with a name in it")
        elif resolve is Resolve.SRV and all(urlsplit(url).port for url in urls):
            yield Problem(how, "'srv' needs a URL without a port, which the records tell")


def _has_name(url: str) -> bool:
    host = urlsplit(url).hostname
    if host is None:
        return False
    try:
        ip_address(host)
    except ValueError:
        return True
    return False


def _file_rules(path: Steps, tls: TlsConfig) -> Iterator[Problem]:
    if tls.cert_file and not tls.key_file:
        yield Problem((*path, "key_file"), "is required with cert_file")
    if tls.key_file and not tls.cert_file:
        yield Problem((*path, "cert_file"), "is required with key_file")
    unreadable = [
        name
        for name in ("ca_file", "cert_file", "key_file")
        if (file := getattr(tls, name)) and not os.access(file, os.R_OK)
    ]
    for name in unreadable:
        missing = getattr(tls, name)
        yield Problem((*path, name), f"there is no file {missing!r} that can be read")
    if unreadable:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca_file:
        try:
            context.load_verify_locations(tls.ca_file)
        except OSError:
            yield Problem((*path, "ca_file"), f"{tls.ca_file!r} holds no PEM certificates")
    if tls.cert_file and tls.key_file:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        except (OSError, ValueError) as exc:
            why = getattr(exc, "reason", None) or "not PEM, or with a password"
            yield Problem((*path, "cert_file"), f"is no certificate with key_file's key: {why}")


def _key_rules(config: GatewayConfigSchema) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, key in enumerate(config.security.api_keys):
        path = ("security", "api_keys", index)
        if key.id in seen:
            yield Problem((*path, "id"), f"{key.id!r} is there twice")
        seen.add(key.id)
        for place, model in enumerate(key.allowed_models):
            yield from _must_be_models(config, (*path, "allowed_models", place), [model])


def _store_rules(store: StoreConfig) -> Iterator[Problem]:
    is_redis = store.kind is StoreKind.REDIS
    place = None if store.url is None else parse_store_url(store.url)
    if is_redis and place is None:
        yield Problem(("store", "url"), "is required with kind: redis")
    for name in ("url", "username", "password"):
        if getattr(store, name) is not None and not is_redis:
            yield Problem(("store", name), "needs kind: redis")
    for name in ("sentinel_username", "sentinel_password"):
        is_watched = place is not None and place.topology is Topology.SENTINEL
        if getattr(store, name) is not None and not is_watched:
            yield Problem(("store", name), "needs a URL that begins with redis+sentinel://")
    if store.path is not None and store.kind not in (StoreKind.AUTO, StoreKind.LMDB):
        yield Problem(("store", "path"), "needs kind: lmdb")
    if store.tls != TlsConfig():
        if place is None or not place.uses_tls:
            yield Problem(("store", "tls"), "needs a URL that begins with rediss")
        if store.tls.server_name is not None:
            yield Problem(("store", "tls", "server_name"), "redis is asked for by the URL's host")
        yield from _file_rules(("store", "tls"), store.tls)
    if store.timeout >= store.lease:
        yield Problem(("store", "timeout"), "must be shorter than store.lease")


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
    if service.tls_certfile and service.tls_keyfile:
        for name in ("tls_certfile", "tls_keyfile"):
            path = getattr(service, name)
            if not os.access(path, os.R_OK):
                yield Problem(("service", name), f"there is no file {path!r} that can be read")


def _overlap(one: str, other: str) -> bool:
    """Whether two addresses could fight for a port: a wildcard covers all the others."""
    return one == other or _is_wildcard(one) or _is_wildcard(other)


def _is_wildcard(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:  # a host name
        return False
