"""The fleet: which models there are, which endpoints serve them, and who gets the next request."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence, Set
from functools import partial
from weakref import WeakValueDictionary
from zlib import crc32

import attrs
import httpx
import trio

from citadel_gateway.app.discovery import Discovery
from citadel_gateway.app.group import Group, Plan
from citadel_gateway.app.upstream_maker import UpstreamMaker, cost_of
from citadel_gateway.app.upstreams import Model, Place, Upstream, tokens_needed
from citadel_gateway.config.flat import AnyConfig, as_schema
from citadel_gateway.config.schema import ModelConfig
from citadel_gateway.errors import GatewayError, invalid_request, model_not_allowed, unknown_model
from citadel_gateway.io.health_monitoring import HealthChecker, check_all
from citadel_gateway.io.resolver import Resolver
from citadel_gateway.io.transport import make_probe_client
from citadel_gateway.policy.affinity import Affinity
from citadel_gateway.policy.arrivals import compare
from citadel_gateway.policy.auth import ApiKey
from citadel_gateway.policy.cordons import Cordons
from citadel_gateway.policy.endpoint import Endpoint, nobody_asks
from citadel_gateway.policy.quorum import Quorum
from citadel_gateway.policy.selection import Share, evenly, make_picker, share_by_cost
from citadel_gateway.policy.sessions import Sessions
from citadel_gateway.wire.openai_request import AUTO, InferenceRequest, Kind


@attrs.frozen
class Moves:
    """Endpoints that have come, that get nothing from now on, and that are spoken to otherwise."""

    come: Sequence[Upstream] = ()
    gone: Sequence[Upstream] = ()
    changed: Sequence[Upstream] = ()


class LoadBalancer:
    """Knows every model and endpoint, and picks.

    :param rng: for random choices and jitter; seed it to repeat a run.
    :param resolver: knows the addresses of names.
    :param discovery: knows where endpoints are; by default what the configuration and *resolver*
        say.
    :param previous: one that this is to :meth:`take_over` from; until then it serves nobody, and
        changes nothing of what the two have in common: endpoints, and who waits for them.
    :param on_room: told when those who wait are to be called, as an endpoint takes more.
    :param share: what new endpoints may take of their caps to begin with; ``None`` for all.
    """

    def __init__(
        self,
        config: AnyConfig,
        *,
        rng: random.Random | None = None,
        resolver: Resolver | None = None,
        discovery: Discovery | None = None,
        previous: LoadBalancer | None = None,
        share: int | None = None,
        on_room: Callable[[], None] = nobody_asks,
    ) -> None:
        self.config = config = as_schema(config)
        self._rng = rng or random.Random()
        self._on_room = on_room
        self.discovery = discovery or Discovery(
            resolver or Resolver(ttl=config.load_balancer.dns_ttl)
        )
        self.cordons: Cordons = Cordons() if previous is None else previous.cordons
        self.on_panic: Callable[[str, bool], None] = lambda *_: None  # told of models
        self._leaving: list[Upstream] = []
        self._previous = previous  # until this one takes over
        self.maker: UpstreamMaker = UpstreamMaker(
            balancing=config.load_balancer,
            cordons=self.cordons,
            rng=self._rng,
            share=share,
            endpoints=WeakValueDictionary() if previous is None else previous.maker.endpoints,
        )
        balancing = config.load_balancer
        self.sessions: Sessions = Sessions() if previous is None else previous.sessions
        # In which clients say what their requests belong to, if that matters.
        self.session_header: bytes | None = (
            balancing.session_header.encode() if balancing.algorithm.goes_by_key else None
        )
        if previous is None:
            self.sessions.idle = balancing.session_ttl
        self.models = {
            str(name): self._make_model(name, model) for name, model in config.models.items()
        }
        self._aliases: dict[str, str] = {
            str(alias): str(name)
            for name, model in config.models.items()
            for alias in model.aliases
        }
        self._is_over = False  # another one has taken over
        self._groups: dict[str, Group] = {}
        self._auto_groups: dict[tuple[str, ...], Group] = {}
        # Of earlier configurations, in which somebody may still wait, but nobody new.
        self._older_groups: list[Group] = []
        if previous is None:
            for name, model in self.models.items():
                model.begin()
                self._groups[name] = self._make_group(name, [model])
                self._groups[name].begin()
        windows = {m.config.context_window for m in self.models.values()}
        self._windows = sorted(window for window in windows if window is not None)
        self._known_auto_groups: dict[tuple[Kind, int, str | None], Group] = {}

    @property
    def upstreams(self) -> list[Upstream]:
        return [upstream for model in self.models.values() for upstream in model.upstreams]

    @property
    def leaving(self) -> list[Upstream]:
        """Those that get nothing new, and still have requests."""
        serving = {upstream.endpoint for upstream in self.upstreams}
        self._leaving = [
            u for u in self._leaving if u.endpoint.in_flight and u.endpoint not in serving
        ]
        return self._leaving

    @property
    def groups(self) -> list[Group]:
        return [*self._groups.values(), *self._auto_groups.values()]

    @property
    def hosts(self) -> set[str]:
        """Every name and address that somebody may connect to."""
        origins = [u.target.origin for u in (*self.upstreams, *self._leaving)]
        hosts = {origin.host for origin in origins}
        return hosts.union(*(self.discovery.hosts(m.id, m.config) for m in self.models.values()))

    def take_over(self, previous: LoadBalancer, now: float) -> None:
        """Go on where *previous* is: with its endpoints, its turns, and those who wait.

        It waits for nobody, so that nobody sees half of it.  From now on only this one follows
        names and chooses; *previous* still knows what its own requests began with.
        """
        self.sessions.idle = self.config.load_balancer.session_ttl
        for model in self.models.values():
            self.update(model, now)  # as something may have come or gone meanwhile
        previous._is_over, self._previous = True, None
        reweighed = {u.endpoint for u in self.upstreams if self.maker.configure(u)}
        for endpoint in reweighed:
            if endpoint.warmth < 1.0:
                endpoint.warm_up(now)
        known = {u.endpoint: u for u in previous.upstreams}
        for upstream in self.upstreams:
            if before := known.get(upstream.endpoint):
                upstream.asks_usage = before.asks_usage
        kept = {u.endpoint for u in self.upstreams}
        gone = [u for u in previous.upstreams if u.endpoint not in kept]
        self._leaving = [*previous.leaving, *gone]
        for name, model in self.models.items():
            fresh, before_it = self._make_group(name, [model]), previous._groups.get(name)
            if before_it is None:
                fresh.begin()
            else:
                before_it.renew(fresh, reweighed)
            self._groups[name] = before_it or fresh
        in_use = {*previous._known_auto_groups.values()}
        for names, group in previous._auto_groups.items():
            self._renew_auto_group(group, reweighed)
            if group in in_use and self.models.keys() >= {*names}:
                self._auto_groups[names] = group
            else:
                self._older_groups.append(group)
        for group in previous._older_groups:
            if group.models:
                self._renew_auto_group(group, reweighed)
                self._older_groups.append(group)
        for name, model in self.models.items():
            model.begin(previous.models.get(name))
        for name, model in previous.models.items():
            if name in self.models:
                model.upstreams = self.models[name].upstreams
            else:
                model.end()
        self.cordons.follow({}, kept, now)  # of what was ordered since this one was made
        for endpoint in kept:
            endpoint.eased()  # there may be more room

    def _renew_auto_group(self, group: Group, reweighed: Set[Endpoint]) -> None:
        """Who waits in it has begun with its models, so it gets no others.

        Those that there are no longer, it does not get either.
        """
        models = [self.models[model.id] for model in group.models if model.id in self.models]
        if models:
            group.renew(self._make_auto_group(models), reweighed)

    async def discover(self) -> None:
        """Ask all sources that have not said anything yet; those that fail stay as they are."""
        async with trio.open_nursery() as nursery:
            for model in self.models.values():
                found = partial(self._found, model)
                found()
                nursery.start_soon(self.discovery.look, model.id, model.config, found)

    def _found(self, model: Model) -> None:
        self.update(model, trio.current_time(), joins=False)

    def update(self, model: Model, now: float, *, joins: bool = True) -> Moves:
        """Let *model* have the endpoints that its sources list now.

        :param joins: those that come find others at work, if there are others.
        """
        if self._is_over:
            return Moves()
        before = {upstream.place.name: upstream for upstream in model.upstreams}
        places = self._places(model)
        diff = compare({name: u.place for name, u in before.items()}, places)
        if not (diff.come or diff.gone or diff.changed):
            return Moves()
        gone = [before[name] for name in diff.gone]
        # Others serve with some of them.
        shared = {u.endpoint for u in self._previous.upstreams} if self._previous else set()
        new = [self.maker.make(model, places[name]) for name in diff.come]
        changed = [self.maker.make(model, places[name]) for name in diff.changed]
        for upstream in new:
            if upstream.endpoint not in shared:
                upstream.endpoint.health = self.maker.unknown_health()
                upstream.endpoint.is_newcomer = joins and bool(before)
                self.maker.configure(upstream)
        for upstream in gone:
            model.remove(upstream)
            self._leaving.append(upstream)
        model.add(new)
        for upstream in changed:
            upstream.asks_usage = before[upstream.place.name].asks_usage
            model.replace(upstream)
            if upstream.endpoint not in shared:
                self.maker.configure(upstream)
                upstream.endpoint.warm_up(now)
        for group in self._groups_of(model):
            for upstream in gone:
                group.retire(upstream)
            group.add(new)
            for upstream in changed:
                group.replace(upstream)
        for upstream in changed:
            upstream.endpoint.on_standing()
            upstream.endpoint.eased()  # there may be more room
        return Moves(new, gone, changed)

    def _places(self, model: Model) -> dict[str, Place]:
        def is_down(name: str) -> bool:
            endpoint = self.maker.endpoints.get((model.id, name))
            return endpoint is not None and endpoint.is_out()

        return self.discovery.places(model.id, model.config, is_down)

    def _groups_of(self, model: Model) -> list[Group]:
        return [g for g in (*self.groups, *self._older_groups) if model in g.models]

    def resolve(self, name: str) -> Model | None:
        """The model called *name*, by its own name or by an alias."""
        return self.models.get(self._aliases.get(name, name))

    def get_available_models(self) -> list[str]:
        """Models that can be asked: live in the event loop, from one round of probes outside."""
        if trio.lowlevel.in_trio_run():
            return self.available_models(trio.current_time())
        return trio.run(self._probe_and_list)

    async def _probe_and_list(self) -> list[str]:
        async with make_probe_client() as client:
            await self.probe_once(client)
        return self.available_models(trio.current_time())

    async def probe_once(self, client: httpx.AsyncClient) -> None:
        """One round of probes, as long as they may take."""
        longest = self.config.load_balancer.health_check_timeout + 1
        with trio.move_on_after(longest):
            await self.discover()
        await check_all([self.make_checker(u, client) for u in self.upstreams], longest)

    def make_checker(
        self,
        upstream: Upstream,
        client: httpx.AsyncClient,
        on_flip: Callable[[Endpoint], None] = lambda _: None,
    ) -> HealthChecker:
        """Watches one endpoint; *on_flip* is told when it becomes well or ill."""
        balancing = self.config.load_balancer
        return HealthChecker(
            endpoint=upstream.endpoint,
            probe=upstream.probe,
            client=client,
            every=balancing.health_check_interval,
            within=balancing.health_check_timeout,
            on_flip=on_flip,
            jitter=self._rng.random,
        )

    def available_models(self, now: float) -> list[str]:
        """Models of which at least one endpoint would be given a request."""
        return [
            model.id
            for model in self.models.values()
            if any(u.endpoint.is_available(now) for u in model.upstreams)
        ]

    def plan(self, request: InferenceRequest, key: ApiKey | None = None) -> Plan:
        """Where *request* may go.  Raises :class:`GatewayError` if nowhere."""
        routing = self.config.gateway
        if not routing.model_routing_enabled:
            return self._plan_model(self.config.default_model(), "routing_off", request, key)
        if request.model is not None:
            model = self.resolve(request.model)
            if model is None:
                known = [m for m in self.models if key is None or key.may_use(m)]
                raise unknown_model(request.model, known)
            reason = "requested" if model.id == request.model else "alias"
            return self._plan_model(model.id, reason, request, key)
        if not routing.intelligent_routing:
            return self._plan_model(self.config.default_model(), "default_model", request, key)
        group = self._auto_group(request, key)
        return Plan((group,), f"auto:{self.config.load_balancer.algorithm.value}")

    def possible_groups(self, key: ApiKey | None) -> list[Group]:
        """All groups that a request of *key* could begin with; none if too many are possible.

        A request that leaves the choice may begin with any set of models, and so, where there is
        a choice, nothing can be said of all of them.
        """
        routing = self.config.gateway
        if not routing.model_routing_enabled:
            model = self.resolve(self.config.default_model())
            return [] if model is None else [self._groups[model.id]]
        names = [name for name in self._groups if key is None or key.may_use(name)]
        if routing.intelligent_routing and len(names) > 1:
            return []
        return [self._groups[name] for name in names]

    def larger_contexts(self, than: str, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """Those of *groups* that can hold more than the model *than* can."""
        window = self.models[than].config.context_window
        return tuple(
            group
            for group in groups
            if (other := self.models[group.name].config.context_window) is None
            or (window is not None and other > window)
        )

    def _plan_model(
        self, name: str, reason: str, request: InferenceRequest, key: ApiKey | None
    ) -> Plan:
        model = self.resolve(name)
        if model is None:
            raise unknown_model(name, list(self.models))
        if key is not None and not key.may_use(model.id):
            raise model_not_allowed(model.id)
        if not model.can_answer(request):
            raise _cannot_answer(model.id, request.kind)
        fallbacks = [self.models[f] for f in model.config.fallbacks if f in self.models]
        usable = [
            m
            for m in fallbacks
            if m.can_answer(request) and m.can_hold(request) and (key is None or key.may_use(m.id))
        ]
        return Plan(tuple(self._groups[m.id] for m in (model, *usable)), reason)

    def _eligible(self, request: InferenceRequest, key: ApiKey | None) -> list[Model]:
        models = list(self.models.values())
        if key is not None:
            models = [m for m in models if key.may_use(m.id)]
        able = [m for m in models if m.can_answer(request)]
        if not able:
            raise _cannot_answer(AUTO, request.kind)
        fitting = [m for m in able if m.can_hold(request)]
        if not fitting:
            raise invalid_request(
                f"The request needs about {tokens_needed(request)} "
                "tokens, more than any model's context window.",
                param="messages" if request.kind is Kind.CHAT else "prompt",
                code="context_length_exceeded",
            )
        return fitting

    def _auto_group(self, request: InferenceRequest, key: ApiKey | None) -> Group:
        """Those who can take *request*; it is the same group for all that differ in little."""
        size = bisect_left(self._windows, tokens_needed(request))
        kind = (request.kind, size, None if key is None else key.id)
        group = self._known_auto_groups.get(kind)
        if group is None:
            group = self._known_auto_groups[kind] = self._group_of(self._eligible(request, key))
        return group

    def _group_of(self, models: list[Model]) -> Group:
        if len(models) == 1:
            return self._groups[models[0].id]  # in one queue with those who ask for it by name
        key = tuple(model.id for model in models)
        group = self._auto_groups.get(key)
        if group is None:
            group = self._auto_groups[key] = self._make_auto_group(models)
            group.begin()
        return group

    def _make_auto_group(self, models: list[Model]) -> Group:
        if not self.config.gateway.cost_optimization_enabled:
            return self._make_group(AUTO, models)
        prices = [cost_of(model.config) for model in models]
        return self._make_group(
            AUTO, models, share_by_cost(prices), min(filter(None, prices), default=None)
        )

    def _make_group(
        self,
        name: str,
        models: list[Model],
        share: Share = evenly,
        cheapest: float | None = None,
    ) -> Group:
        algorithm = self.config.load_balancer.algorithm.value
        # By the file alone, so that all gateways agree; what is found out counts as that at most.
        weights = (e.weight or 1.0 for m in models for e in m.config.all_endpoints())
        heaviest = max(weights, default=1.0)
        affinity = Affinity(heaviest=heaviest, salt=crc32(name.encode()), sessions=self.sessions)
        picker = make_picker(algorithm, self._rng, share, affinity)
        basis = (algorithm, cheapest, heaviest if self.session_header else None)
        return Group(name, tuple(models), picker, share, basis, on_room=self._on_room)

    def _make_model(self, name: str, config: ModelConfig) -> Model:
        threshold = self.config.load_balancer.panic_threshold
        model = Model(name, config, Quorum(threshold, partial(self._note_panic, name)))
        places = self._places(model)
        model.add([self.maker.make(model, place) for place in places.values()])
        return model

    def _note_panic(self, model: str, begins: bool) -> None:
        self.on_panic(model, begins)


def _cannot_answer(model: str, kind: Kind) -> GatewayError:
    return invalid_request(
        f"No model can answer {kind.value} requests."
        if model == AUTO
        else f"The model {model!r} does not answer {kind.value} requests.",
        param="model",
        code="unsupported_request",
    )
