"""What the gateway says about itself: health, models, endpoints, and why it would route how."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import attrs

from citadel_gateway.app.group import Group
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.upstreams import Model, Upstream
from citadel_gateway.policy.auth import ApiKey
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.waitroom import Waitroom
from citadel_gateway.wire.openai_request import AUTO, InferenceRequest

Json = dict[str, Any]


@attrs.define(eq=False)
class Reports:
    """Reads the live state; changes nothing.  ``now`` is in Trio's time.

    :param started: seconds since 1970, for ``created``, which clients expect to be there.
    :param about: which configuration is in use, and since when; which hosts share its store.
    """

    balancer: LoadBalancer
    waitroom: Waitroom
    started: int
    about: Callable[[], Json] = dict

    def health(self, now: float) -> Json:
        """The report of ``/health``."""
        available = self.balancer.available_models(now)
        report: Json = {
            "status": self._status(len(available)),
            "gateway": self.balancer.config.service.name,
            "models": available,
            "timestamp": datetime.now(UTC).isoformat(),
        }
        models = self.balancer.models.values()
        if panics := [m.id for m in models if m.quorum.is_panicking]:
            report["panic"] = panics
        if cordoned := {m.id: n for m in models if (n := _cordoned(m))}:
            report["cordoned"] = cordoned
        return report

    def models(self, now: float, key: ApiKey | None) -> Json:
        data = [
            self._card(model, now)
            for model in self.balancer.models.values()
            if key is None or key.may_use(model.id)
        ]
        return {"object": "list", "data": data}

    def model(self, name: str, now: float, key: ApiKey | None) -> Json | None:
        """One model by its name or an alias; ``None`` if it is unknown, or not for this key."""
        model = self.balancer.resolve(name)
        if model is None or (key is not None and not key.may_use(model.id)):
            return None
        return self._card(model, now)

    def status(self, now: float, key: ApiKey | None) -> Json:
        """The report of ``/models/status``: of the models that *key* may use."""
        report = self.health(now)
        performance = self.balancer.config.performance
        return {
            "gateway": report["gateway"],
            "status": report["status"],
            "timestamp": report["timestamp"],
            "models": {
                model.id: {
                    "status": "available" if model.id in report["models"] else "unavailable",
                    "endpoints": [_endpoint(u, now) for u in model.upstreams],
                    "sources": self.balancer.discovery.report(model.id, model.config),
                    "panic": model.quorum.is_panicking,
                    "waiting": self.waitroom.depth(model.id),
                }
                for model in self.balancer.models.values()
                if key is None or key.may_use(model.id)
            },
            **self.about(),
            "waiting_for_any_model": self.waitroom.depth(AUTO),
            "limits": {
                "in_flight": self.waitroom.taken,
                "max_concurrent_requests": performance.max_concurrent_requests,
                "rate_limit_rps": performance.rate_limit_rps
                if performance.rate_limiting_enabled
                else None,
                "queue_size": self.balancer.config.load_balancer.queue_size,
            },
        }

    def route(
        self, request: InferenceRequest, session: int | None, key: ApiKey | None, now: float
    ) -> Json:
        """Where *request* would go right now, and why.  Raises ``GatewayError`` as routing does.

        :param session: the key of what it belongs to.
        """
        plan = self.balancer.plan(request, key)
        return {
            "reason": plan.reason,
            "algorithm": self.balancer.config.load_balancer.algorithm.value,
            "prompt_tokens_estimate": request.prompt_tokens,
            "would_pick": _preview(plan.groups[0], session, now),
            "groups": [
                {
                    "name": group.name,
                    "role": "first choice" if i == 0 else "fallback",
                    "candidates": [_candidate(group, u, now) for u in group.upstreams.values()],
                }
                for i, group in enumerate(plan.groups)
            ],
        }

    def _status(self, available: int) -> str:
        if not available:
            return "unhealthy"
        return "healthy" if available == len(self.balancer.models) else "degraded"

    def _card(self, model: Model, now: float) -> Json:
        available = any(u.endpoint.is_available(now) for u in model.upstreams)
        return {
            "id": model.id,
            "object": "model",
            "created": self.started,
            "owned_by": self.balancer.config.service.name,
            "capabilities": [c.value for c in model.config.capabilities],
            "context_window": model.config.context_window,
            "aliases": list(model.config.aliases),
            "status": "available" if available else "unavailable",
        }


def _cordoned(model: Model) -> int:
    return sum(u.endpoint.cordoned for u in model.upstreams)


def _endpoint(upstream: Upstream, now: float) -> Json:
    endpoint = upstream.endpoint
    probed = endpoint.health.observed_at
    return {
        "url": endpoint.url,
        "engine": upstream.known_engine.value,
        "healthy": endpoint.health.healthy,
        "breaker": endpoint.breaker.state(now).value,
        "in_flight": endpoint.in_flight,
        "max_concurrent": endpoint.max_concurrent,
        "limit": endpoint.limit,
        "cordoned": endpoint.cordoned,
        "slow_start_share": endpoint.warmth,
        "weight": endpoint.weight,
        "latency_seconds": round(endpoint.latency.value, 6),
        "last_error": endpoint.health.last_error,
        "last_probe_seconds_ago": None if probed is None else round(now - probed, 3),
    }


def _candidate(group: Group, upstream: Upstream, now: float) -> Json:
    endpoint = upstream.endpoint
    return {
        "model": endpoint.model,
        "endpoint": endpoint.url,
        "eligible": _why_not(endpoint, now) is None,
        "why_not": _why_not(endpoint, now),
        "in_flight": endpoint.in_flight,
        "max_concurrent": endpoint.max_concurrent,
        "limit": endpoint.limit,
        "weight": endpoint.weight,
        "cost": endpoint.cost,
        "cost_share": round(group.share(endpoint), 4),
        "latency_seconds": round(endpoint.latency.value, 6),
    }


def _why_not(endpoint: Endpoint, now: float) -> str | None:
    if endpoint.cordoned:
        return "cordoned"
    if not endpoint.is_in_service():
        return f"unhealthy: {endpoint.health.last_error or 'not probed yet'}"
    if now < endpoint.cooling_until:
        return f"asked to be left alone for {endpoint.cooling_until - now:.1f} s more"
    if not endpoint.breaker.would_admit(now):
        return f"breaker {endpoint.breaker.state(now).value}"
    if not endpoint.has_room():
        return "full: the request would wait"
    return None


def _preview(group: Group, session: int | None, now: float) -> Json | None:
    choice = group.preview(now, session)
    return None if choice is None else {"model": choice.model, "endpoint": choice.url}
