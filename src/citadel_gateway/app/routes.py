"""Every route but inference, on Quart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, Protocol

import orjson
import trio
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from citadel_gateway.app.admin import MONITORING, add_admin
from citadel_gateway.app.docs_page import read_asset
from citadel_gateway.app.guard import Doorkeeper, Visitor
from citadel_gateway.app.host import Host
from citadel_gateway.app.openapi import openapi_document
from citadel_gateway.app.reports import Reports
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.errors import (
    GatewayError,
    error_body,
    internal_error,
    invalid_request,
    method_not_allowed,
    not_found,
    unknown_model,
)
from citadel_gateway.io.metrics import CONTENT_TYPE
from citadel_gateway.policy.auth import ApiKey
from citadel_gateway.wire.headers import Fields
from citadel_gateway.wire.openai_request import Kind
from citadel_gateway.wire.session import parse_with_key

_MOST_BODY = 2**20
_LIVE = ("/livez", "/healthz", "/health/liveliness")
_READY = ("/readyz", "/health/readiness")
PROBED = frozenset((*_LIVE, *_READY))
"""Paths that balancers and supervisors ask for all day."""

_CSP = "default-src 'self'; frame-ancestors 'none'"


class Gateway(Protocol):
    """What the routes need of the service."""

    host: Host

    @property
    def config(self) -> GatewayConfigSchema: ...

    @property
    def reports(self) -> Reports: ...

    @property
    def doorkeeper(self) -> Doorkeeper: ...

    def is_ready(self) -> bool: ...

    def note_crash(self, where: str, exc: Exception) -> None: ...


def make_quart_app(gateway: Gateway) -> QuartTrio:
    """The Quart application.  It holds no state; it reports the gateway's."""
    app = QuartTrio("citadel_gateway", static_folder=None)
    app.config.update(
        RESPONSE_TIMEOUT=None,
        BODY_TIMEOUT=10,
        MAX_CONTENT_LENGTH=_MOST_BODY,
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    _add_health(app, gateway)
    _add_models(app, gateway)
    add_admin(app, gateway)
    _add_documentation(app, gateway)
    _add_error_handlers(app, gateway)
    return app


def _add_health(app: QuartTrio, gateway: Gateway) -> None:
    monitoring = gateway.config.monitoring

    async def health() -> Response:
        report = gateway.host.health(gateway.reports.health(trio.current_time()))
        return _json(report, 503 if report["status"] == "unhealthy" else 200)

    async def livez() -> Response:
        return _json({"status": "alive"})

    async def readyz() -> Response:
        ready = gateway.is_ready()
        return _json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics() -> Response:
        if MONITORING not in (request.scope.get("extensions") or {}):
            _key(gateway)  # the page names every endpoint
        return Response(await gateway.host.metrics(), content_type=CONTENT_TYPE)

    _get(app, monitoring.health_check_endpoint, health)
    for path in _LIVE:
        _get(app, path, livez)
    for path in _READY:
        _get(app, path, readyz)
    _get(app, monitoring.metrics_endpoint, metrics)


def _add_models(app: QuartTrio, gateway: Gateway) -> None:
    async def models() -> Response:
        return _json(gateway.reports.models(trio.current_time(), _key(gateway)))

    async def model(name: str) -> Response:
        key = _key(gateway)
        card = gateway.reports.model(name, trio.current_time(), key)
        if card is None:
            known = gateway.reports.models(trio.current_time(), key)["data"]
            raise unknown_model(name, [each["id"] for each in known])
        return _json(card)

    async def status() -> Response:
        own = gateway.reports.status(trio.current_time(), _key(gateway))
        return _json(await gateway.host.status(own))

    async def route() -> Response:
        visitor = _identify(gateway)
        if gateway.doorkeeper.admit(visitor, trio.current_time()) is None:
            await gateway.doorkeeper.admit_far(visitor)
        data = await request.get_data(as_text=False)
        body = data if isinstance(data, bytes) else data.encode()
        named = request.headers.get(gateway.config.load_balancer.session_header, "")
        asked, session = parse_with_key(Kind.CHAT, body, named.encode("latin-1"))
        return _json(gateway.reports.route(asked, session, visitor.key, trio.current_time()))

    _get(app, "/v1/models", models)
    _get(app, "/v1/models/<path:name>", model)
    _get(app, "/models/status", status)
    app.add_url_rule("/models/route", "route", route, methods=["POST"])


def _add_documentation(app: QuartTrio, gateway: Gateway) -> None:
    monitoring = gateway.config.monitoring
    document = openapi_document(
        version=version("citadel-gateway"),
        health_path=monitoring.health_check_endpoint,
        metrics_path=monitoring.metrics_endpoint,
        keys_required=bool(gateway.config.security.api_keys),
    )

    async def openapi() -> Response:
        return _json(document)

    async def docs(name: str = "docs.html") -> Response:
        asset = read_asset(name)
        if asset is None:
            raise not_found(request.path)
        body, content_type = asset
        return Response(body, content_type=content_type, headers={"content-security-policy": _CSP})

    _get(app, "/openapi.json", openapi)
    _get(app, "/docs", docs)
    _get(app, "/docs/<name>", docs)


def _add_error_handlers(app: QuartTrio, gateway: Gateway) -> None:
    async def refused(error: GatewayError) -> Response:
        headers = {k.decode(): v.decode() for k, v in error.all_headers()}
        return Response(error.body(), error.status, headers, content_type="application/json")

    async def http_error(error: HTTPException) -> Response:
        match error.code or 500:
            case 404:
                return await refused(not_found(request.path))
            case 405:
                allowed = dict(error.get_headers())["Allow"]
                return await refused(method_not_allowed(request.method, request.path, allowed))
            case 413:
                message = f"The request body is larger than {_MOST_BODY} bytes."
                return await refused(invalid_request(message, code="request_too_large", status=413))
            case status:
                body = error_body(error.description or error.name, "invalid_request_error", None)
                return Response(body, status, content_type="application/json")

    async def crashed(error: Exception) -> Response:
        gateway.note_crash("routes", error)
        return await refused(internal_error())

    app.register_error_handler(GatewayError, refused)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, crashed)


def _identify(gateway: Gateway) -> Visitor:
    scope: dict[str, Any] = dict(request.scope)
    return gateway.doorkeeper.identify(scope, Fields(scope["headers"]))


def _key(gateway: Gateway) -> ApiKey | None:
    """The key that was shown; raises 401 where one is needed."""
    return _identify(gateway).key


def _get(app: QuartTrio, path: str, view: Callable[..., Awaitable[Response]]) -> None:
    app.add_url_rule(path, f"GET {path}", view, methods=["GET"])


def _json(value: Any, status: int = 200) -> Response:
    return Response(
        orjson.dumps(value),
        status,
        {"cache-control": "no-store"},
        content_type="application/json",
    )
