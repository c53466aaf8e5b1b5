"""What an operator may do to a running fleet: take endpoints out of service, and put them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import trio

from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.config.hooks import HOOKS
from citadel_gateway.config.values import Url
from citadel_gateway.errors import invalid_request, unknown_endpoint
from citadel_gateway.policy.cordons import is_called
from citadel_gateway.policy.endpoint import Endpoint

LONGEST_DRAIN = 3600.0
DRAIN = 30.0  # seconds, unless the operator says otherwise


@attrs.frozen
class Order:
    """An operator's wish.

    :param url: of an endpoint; of a name with several addresses, it means all of them.
    :param model: of the models that the endpoint serves, only this one.
    :param within: seconds that a drain may take.
    """

    url: str
    model: str | None = None
    within: float = DRAIN

    @classmethod
    def parse(cls, raw: object) -> Order:
        """From JSON.  Raises ``GatewayError`` 400."""
        if not isinstance(raw, dict):
            raise invalid_request("The body must be a JSON object with an endpoint.")
        for field in raw:
            if field not in {"endpoint", "model", "within"}:
                raise invalid_request(f"There is no field {str(field)[:50]!r}.", param=field)
        url, model, within = raw.get("endpoint"), raw.get("model"), raw.get("within", DRAIN)
        if not isinstance(url, str):
            raise invalid_request("The endpoint must be its URL.", param="endpoint")
        if model is not None and not isinstance(model, str):
            raise invalid_request("The model must be a name.", param="model")
        if isinstance(within, bool) or not isinstance(within, int | float):
            within = math.nan
        if not 0 <= within <= LONGEST_DRAIN:
            raise invalid_request(
                f"within must be a number of seconds from 0 to {LONGEST_DRAIN:g}.", param="within"
            )
        return cls(_as_configured(url), model, float(within))


def _as_configured(url: str) -> str:
    """As the configuration would read it: without a slash at its end, for one."""
    configured, _, address = url.partition(" [")
    try:
        read: str = HOOKS[Url](configured, Url)
    except (TypeError, ValueError) as exc:
        raise invalid_request(f"The endpoint {exc}.", param="endpoint") from None
    return f"{read} [{address}" if address else read


@attrs.define(eq=False)
class Operations:
    """Carries out orders.

    :param balancer: whoever knows the fleet right now.
    :param pump: calls requests in the queue for which things may have changed.
    :param on_order: told what was done to which endpoint, for the log.
    """

    balancer: Callable[[], LoadBalancer]
    pump: Callable[[], None]
    on_order: Callable[[str, Endpoint], None]

    async def carry_out(self, what: str, order: Order) -> dict[str, Any]:
        """*what* is ``cordon``, ``uncordon`` or ``drain``.  Raises ``GatewayError`` 404."""
        if what == "drain":
            return await self.drain(order)
        return self.carry_out_now(what, order)

    def carry_out_now(self, what: str, order: Order) -> dict[str, Any]:
        """The same for those that wait for nothing: ``cordon`` and ``uncordon``."""
        return self.cordon(order) if what == "cordon" else self.uncordon(order)

    def cordon(self, order: Order) -> dict[str, Any]:
        """Nothing new for the endpoint; requests that it has go on, and so do its probes."""
        return self._report(self._cordon(order))

    def uncordon(self, order: Order) -> dict[str, Any]:
        endpoints = self._find(order)
        self.balancer().cordons.uncordon(endpoints, self._all(), trio.current_time())
        self._tell("uncordoned", endpoints)
        return self._report(endpoints)

    async def drain(self, order: Order) -> dict[str, Any]:
        """Cordon it, and wait until its last request has ended, or it is wanted again."""
        endpoints = self._cordon(order)
        with trio.move_on_after(order.within):
            await _wait_until_idle(endpoints)
        is_done = all(e.cordoned and not e.in_flight for e in endpoints)
        if is_done:
            self._tell("drained", endpoints)
        return {"drained": is_done, **self._report(endpoints)}

    def show(self) -> dict[str, Any]:
        return self._report(self._all())

    def must_exist(self, order: Order) -> None:
        """Raises ``GatewayError`` 404 if the order is about nothing."""
        self._find(order)

    def cordoned(self) -> list[tuple[str, str]]:
        """What is out of service, for :meth:`restore`: models and URLs."""
        return sorted(self.balancer().cordons.names)

    def restore(self, names: Iterable[tuple[str, str]]) -> None:
        """Take out of service what was so before this process began."""
        cordons = self.balancer().cordons
        cordons.names.update(names)
        for endpoint in self._all():
            cordons.apply(endpoint)

    def _cordon(self, order: Order) -> list[Endpoint]:
        endpoints = self._find(order)
        self.balancer().cordons.cordon(order.url, endpoints)
        self._tell("cordoned", endpoints)
        return endpoints

    def _tell(self, what: str, endpoints: list[Endpoint]) -> None:
        for endpoint in endpoints:
            self.on_order(what, endpoint)
        self.pump()

    def _all(self) -> list[Endpoint]:
        return [u.endpoint for u in (*self.balancer().upstreams, *self.balancer().leaving)]

    def _find(self, order: Order) -> list[Endpoint]:
        """Those that are meant.  Raises ``GatewayError`` 404 if there are none."""
        every = self._all()
        model = order.model and getattr(self.balancer().resolve(order.model), "id", order.model)
        found = [e for e in every if is_called(e, order.url) and model in {None, e.model}]
        if not found:
            raise unknown_endpoint(order.url, sorted({e.url for e in every}), order.model)
        return found

    def _report(self, endpoints: list[Endpoint]) -> dict[str, Any]:
        return {
            "endpoints": [
                {
                    "model": e.model,
                    "endpoint": e.url,
                    "cordoned": e.cordoned,
                    "in_flight": e.in_flight,
                    "healthy": e.health.healthy,
                }
                for e in endpoints
            ]
        }


async def _wait_until_idle(endpoints: list[Endpoint]) -> None:
    """Until none has a request, or one is not cordoned any more."""
    done = trio.Event()

    def look(_: Endpoint | None = None) -> None:
        if all(e.in_flight == 0 for e in endpoints) or not all(e.cordoned for e in endpoints):
            done.set()

    look()
    for endpoint in endpoints:
        endpoint.watchers.append(look)
    try:
        await done.wait()
    finally:
        for endpoint in endpoints:
            endpoint.watchers.remove(look)
