"""The routes by which an operator acts on a running gateway, and who may use them.

With a key that is flagged ``admin`` in the configuration, that key is needed, and it is enough, on
either listener.  Without any, orders are taken by the listener for metrics alone, and only from
the machine itself: not through a proxy, and not from a web page, whose browser would gladly send
them (hence JSON, which it may not send elsewhere unasked, and a ``Host`` that is the machine's own,
which a name that was bent to this address is not).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import orjson
from quart import Response, request
from quart_trio import QuartTrio

from citadel_gateway.app.guard import Doorkeeper
from citadel_gateway.app.host import Host
from citadel_gateway.app.operations import Order
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.errors import admin_required, invalid_request, unsupported_media_type
from citadel_gateway.wire.headers import Fields

MONITORING = "citadel.monitoring"
"""ASGI extension: the request came in by the listener for metrics, which needs no key."""

ADMIN = "/admin/endpoints"
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


class Administered(Protocol):
    """What these routes need of the service."""

    @property
    def config(self) -> GatewayConfigSchema: ...

    @property
    def doorkeeper(self) -> Doorkeeper: ...

    host: Host


def add_admin(app: QuartTrio, gateway: Administered) -> None:
    async def endpoints() -> Response:
        _admit(gateway)
        return _json(await gateway.host.endpoints())

    def taker(what: str) -> Callable[[], Awaitable[Response]]:
        async def take() -> Response:
            _admit(gateway)
            return _json(await gateway.host.order(what, await _order(what)))

        return take

    app.add_url_rule(ADMIN, "endpoints", endpoints, methods=["GET"])
    for what in ("cordon", "uncordon", "drain", "add", "remove"):
        app.add_url_rule(f"{ADMIN}/{what}", what, taker(what), methods=["POST"])


def _admit(gateway: Administered) -> None:
    """Raises ``GatewayError`` 401 or 403 unless an operator is asking."""
    scope: dict[str, Any] = dict(request.scope)
    fields = Fields(scope["headers"])
    if any(key.admin for key in gateway.config.security.api_keys):
        key = gateway.doorkeeper.identify(scope, fields).key
        if key is None or not key.is_admin:
            raise admin_required("This key is not an admin key.")
    elif not _is_from_here(scope, fields):
        raise admin_required(
            "No admin key is configured, so orders are taken only on this machine, by the "
            "listener for metrics (monitoring.prometheus_port)."
        )


def _is_from_here(scope: dict[str, Any], fields: Fields) -> bool:
    return (
        MONITORING in (scope.get("extensions") or {})
        and _is_loopback((scope.get("client") or ("",))[0])
        and not any(name in fields for name in _FORWARDED)
        and _is_own_name(fields.get(b"host", b"").decode("latin-1"))
    )


def _is_own_name(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.lower() == "localhost" or _is_loopback(name.strip("[]"))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


async def _order(what: str) -> Order:
    if request.mimetype != "application/json":
        raise unsupported_media_type("The Content-Type must be application/json.")
    try:
        return Order.parse(what, orjson.loads(await request.get_data()))
    except orjson.JSONDecodeError as exc:
        raise invalid_request(f"The body is not JSON: {exc}") from None


def _json(value: dict[str, Any]) -> Response:
    return Response(
        orjson.dumps(value), 200, {"cache-control": "no-store"}, content_type="application/json"
    )
