"""What an operator may do to a running fleet: cordon endpoints, add some and remove them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import trio

from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.upstreams import Model
from citadel_gateway.config.endpoint_list import parse_addition
from citadel_gateway.config.hooks import HOOKS
from citadel_gateway.config.problems import InvalidConfig
from citadel_gateway.config.values import Url
from citadel_gateway.errors import invalid_request, unknown_endpoint, unknown_model
from citadel_gateway.policy.cordons import Name, is_called
from citadel_gateway.policy.endpoint import Endpoint

LONGEST_DRAIN = 3600.0
DRAIN = 30.0  # seconds, unless the operator says otherwise

CORDON, ADDED = "cordon", "added"
"""What an order may change: whether an endpoint is out of service, and what there is by order."""


@attrs.frozen
class Order:
    """An operator's wish.

    :param url: of an endpoint; of a name with several addresses, it means all of them.
    :param model: of the models that the endpoint serves, only this one.
    :param within: seconds that a drain may take.
    :param options: of an endpoint that is to be added, as in the configuration.
    """

    url: str
    model: str | None = None
    within: float = DRAIN
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @classmethod
    def parse(cls, what: str, raw: object) -> Order:
        """From JSON.  Raises ``GatewayError`` 400."""
        if not isinstance(raw, dict):
            raise invalid_request("The body must be a JSON object with an endpoint.")
        if what == "add":
            return cls._parse_addition(raw)
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

    @classmethod
    def _parse_addition(cls, raw: Mapping[str, Any]) -> Order:
        options = {name: said for name, said in raw.items() if name not in {"endpoint", "model"}}
        order = cls.parse("", {n: said for n, said in raw.items() if n not in options})
        if order.model is None:
            raise invalid_request("The model must be named.", param="model")
        if "url" in options:
            raise invalid_request("The URL is the endpoint.", param="url")
        return attrs.evolve(order, within=0.0, options=options)


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
    :param follow: lets the fleet be as is known now.
    :param on_order: told what was done to which endpoint, for the log.
    :param on_change: told what was ordered, :data:`CORDON` or :data:`ADDED`, and of whom.
    """

    balancer: Callable[[], LoadBalancer]
    pump: Callable[[], None]
    follow: Callable[[], None]
    on_order: Callable[[str, Endpoint], None]
    on_change: Callable[[str, Iterable[Name]], None] = attrs.field(
        default=lambda _what, _names: None, init=False
    )

    async def carry_out(self, what: str, order: Order) -> dict[str, Any]:
        """Raises ``GatewayError`` 400 or 404.

        :param what: ``cordon``, ``uncordon``, ``drain``, ``add`` or ``remove``.
        """
        match what:
            case "drain":
                return await self.drain(order)
            case "remove":
                return await self.remove(order)
            case "cordon":
                return self.cordon(order)
            case "uncordon":
                return self.uncordon(order)
        return self.add(order)

    def catch_up(self, what: str, order: Order) -> None:
        """Do as was ordered before this process could hear of it; all others know it already."""
        name = (order.model or "", order.url)
        match what:
            case "cordon" | "uncordon":
                self.take_over({name: what == "cordon"}, {})
            case "add" | "remove":
                self.take_over({}, {name: order.options if what == "add" else None})

    def cordon(self, order: Order) -> dict[str, Any]:
        """Nothing new for the endpoint; requests that it has go on, and so do its probes."""
        return self._report(self._cordon(order))

    def uncordon(self, order: Order) -> dict[str, Any]:
        endpoints = self._find(order)
        cordons, before = self.balancer().cordons, {*self.balancer().cordons.names}
        cordons.uncordon(endpoints, self._all(), trio.current_time())
        self._tell("uncordoned", endpoints)
        ordered = {(endpoint.model, order.url) for endpoint in endpoints}
        self.on_change(CORDON, ordered | (before ^ cordons.names))
        return self._report(endpoints)

    async def drain(self, order: Order) -> dict[str, Any]:
        """Cordon it, and wait until its last request has ended, or it is wanted again."""
        endpoints = self._cordon(order)
        with trio.move_on_after(order.within):
            await _wait_until_idle(endpoints, is_wanted=lambda e: not e.cordoned)
        is_done = all(e.cordoned and not e.in_flight for e in endpoints)
        if is_done:
            self._tell("drained", endpoints)
        return {"drained": is_done, **self._report(endpoints)}

    def add(self, order: Order) -> dict[str, Any]:
        """Let a model have one more endpoint, or one that was added be otherwise."""
        model = self._model_for(order)
        self.balancer().discovery.additions.put(model.id, order.url, order.options)
        self.follow()
        found = [e for e in self._serving() if is_called(e, order.url) and e.model == model.id]
        self._tell("added", found)
        self.on_change(ADDED, [(model.id, order.url)])
        return self._report(found)

    async def remove(self, order: Order) -> dict[str, Any]:
        """Take back what was added, and wait until its last request has ended."""
        endpoints = self._remove(order)
        with trio.move_on_after(order.within):
            await _wait_until_idle(endpoints)
        return {"drained": not any(e.in_flight for e in endpoints), **self._report(endpoints)}

    def show(self) -> dict[str, Any]:
        return self._report(self._all())

    def check(self, what: str, order: Order) -> None:
        """Raises ``GatewayError`` 400 or 404 if nobody could carry it out."""
        match what:
            case "add":
                self._model_for(order)
            case "remove":
                self._added(order)
            case _:
                self._find(order)

    def take_over(
        self,
        cordons: Mapping[Name, bool],
        added: Mapping[Name, Mapping[str, Any] | None],
    ) -> None:
        """Do as operators have ordered elsewhere.

        :param cordons: by model and URL, whether it is out of service.
        :param added: the same for what was added, or is to be no more.
        """
        balancer = self.balancer()
        before = self._serving()
        for (model, url), options in added.items():
            if options is None:
                balancer.discovery.additions.drop(model, url)
            else:
                balancer.discovery.additions.put(model, url, options)
        changed = balancer.cordons.follow(cordons, self._all(), trio.current_time())
        self.follow()
        after = self._serving()
        for what, endpoints in (
            ("added", _without(after, before)),
            ("removed", _without(before, after)),
            ("cordoned", [e for e in changed if e.cordoned]),
            ("uncordoned", [e for e in changed if not e.cordoned]),
        ):
            for endpoint in endpoints:
                self.on_order(what, endpoint)
        self.pump()

    def added(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """What was added, for :meth:`restore_added`: models, URLs and options."""
        return [*self.balancer().discovery.additions.written()]

    def restore_added(self, added: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
        """Add what was added before this process began; before it serves."""
        for model, url, options in added:
            self.balancer().discovery.additions.put(model, url, options)

    def cordoned(self) -> list[tuple[str, str]]:
        """What is out of service, for :meth:`restore`: models and URLs."""
        return sorted(self.balancer().cordons.names)

    def restore(self, names: Iterable[tuple[str, str]]) -> None:
        """Take out of service what was so before this process began."""
        cordons = self.balancer().cordons
        cordons.names.update(names)
        for endpoint in self._all():
            cordons.apply(endpoint)

    def _model_for(self, order: Order) -> Model:
        """The model that is to have one more.  Raises ``GatewayError``."""
        balancer, name = self.balancer(), order.model or ""
        model = balancer.resolve(name)
        if model is None:
            raise unknown_model(name, [*balancer.models])
        try:
            parse_addition({**order.options, "url": order.url}, model.config)
        except InvalidConfig as exc:
            problem = exc.problems[0]
            raise invalid_request(f"{problem}.", param=str(problem.path[0])) from None
        was_added = model.id in balancer.discovery.additions.models_with(order.url)
        if not was_added and any(is_called(u.endpoint, order.url) for u in model.upstreams):
            raise invalid_request(
                f"The endpoint {order.url!r} of {model.id!r} is listed already.", param="endpoint"
            )
        return model

    def _added(self, order: Order) -> list[str]:
        """The models to which it was added; none if another order has just removed it.

        Raises ``GatewayError``.
        """
        model, balancer = self._model_id(order), self.balancer()
        models = balancer.discovery.additions.models_with(order.url)
        found = [each for each in models if model in {None, each}]
        if not found and not self._going(order):
            if not any(is_called(endpoint, order.url) for endpoint in self._serving()):
                raise unknown_endpoint(order.url, sorted(e.url for e in self._serving()), model)
            raise invalid_request(
                f"The endpoint {order.url!r} was not added by an order: take it out of what lists "
                "it, or cordon it.",
                param="endpoint",
            )
        return found

    def _remove(self, order: Order) -> list[Endpoint]:
        """Those that get nothing from now on, or get nothing any more and have requests still.

        Raises ``GatewayError``.
        """
        models = self._added(order)
        if not models:
            return self._going(order)
        before = [e for e in self._serving() if is_called(e, order.url) and e.model in models]
        for model in models:
            self.balancer().discovery.additions.drop(model, order.url)
        self.follow()
        serving = {*self._serving()}
        gone = [endpoint for endpoint in before if endpoint not in serving]
        self._tell("removed", gone)
        self.on_change(ADDED, [(model, order.url) for model in models])
        return gone

    def _going(self, order: Order) -> list[Endpoint]:
        return self._meant(order, [u.endpoint for u in self.balancer().leaving])

    def _serving(self) -> list[Endpoint]:
        return [u.endpoint for u in self.balancer().upstreams]

    def _cordon(self, order: Order) -> list[Endpoint]:
        endpoints = self._find(order)
        self.balancer().cordons.cordon(order.url, endpoints)
        self._tell("cordoned", endpoints)
        self.on_change(CORDON, {(endpoint.model, order.url) for endpoint in endpoints})
        return endpoints

    def _tell(self, what: str, endpoints: list[Endpoint]) -> None:
        for endpoint in endpoints:
            self.on_order(what, endpoint)
        self.follow()  # others may stand in for them
        self.pump()

    def _all(self) -> list[Endpoint]:
        return [u.endpoint for u in (*self.balancer().upstreams, *self.balancer().leaving)]

    def _find(self, order: Order) -> list[Endpoint]:
        """Those that are meant.  Raises ``GatewayError`` 404 if there are none."""
        every = self._all()
        found = self._meant(order, every)
        if not found:
            raise unknown_endpoint(order.url, sorted({e.url for e in every}), order.model)
        return found

    def _meant(self, order: Order, endpoints: Iterable[Endpoint]) -> list[Endpoint]:
        model = self._model_id(order)
        return [e for e in endpoints if is_called(e, order.url) and model in {None, e.model}]

    def _model_id(self, order: Order) -> str | None:
        """Of the model that it names, perhaps by an alias."""
        return order.model and getattr(self.balancer().resolve(order.model), "id", order.model)

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


def _without(endpoints: list[Endpoint], others: list[Endpoint]) -> list[Endpoint]:
    known = {*others}
    return [endpoint for endpoint in endpoints if endpoint not in known]


async def _wait_until_idle(
    endpoints: list[Endpoint], is_wanted: Callable[[Endpoint], bool] = lambda _: False
) -> None:
    """Until none has a request, or one is wanted again."""
    done = trio.Event()

    def look(_: Endpoint | None = None) -> None:
        if all(e.in_flight == 0 for e in endpoints) or any(map(is_wanted, endpoints)):
            done.set()

    look()
    for endpoint in endpoints:
        endpoint.watchers.append(look)
    try:
        await done.wait()
    finally:
        for endpoint in endpoints:
            endpoint.unwatch(look)
