"""What is the case in the gateway right now, for the metrics page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from citadel_gateway.app.generation import Generation
from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.overload import Overload
from citadel_gateway.app.reload import Reloader
from citadel_gateway.app.upstreams import Upstream
from citadel_gateway.io.admission import Admission
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.metrics import Levels, OverloadLevel, StoreLevels
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.priority import NAMES, NEWCOMER
from citadel_gateway.wire.openai_request import AUTO


class Measured(Protocol):
    """What is looked at of the service."""

    admission: Admission
    overload: Overload
    pool: ConnectionPool
    log: JsonLog
    draining: trio.Event
    reloader: Reloader | None

    @property
    def membership(self) -> Membership | None: ...

    @property
    def generation(self) -> Generation: ...

    @property
    def generations(self) -> Sequence[Generation]: ...

    @property
    def open_connections(self) -> int: ...


def measure(service: Measured, now: float) -> Levels:
    """All levels at *now*; cheap enough to be asked for with every page."""
    waitroom, overload, balancer = (
        service.admission.waitroom,
        service.overload,
        service.generation.balancer,
    )
    queues = (*balancer.models, AUTO)
    return Levels(
        endpoints=tuple(u.endpoint for u in all_upstreams(balancer)),
        failing=_failing(balancer),
        panics={name: m.quorum.is_panicking for name, m in balancer.models.items()},
        queue_depths={
            (queue, name): waitroom.depth(queue, rank)
            for queue in queues
            for rank, name in enumerate(NAMES)
        },
        queue_waits={queue: waitroom.wait(queue, NEWCOMER) for queue in queues},
        in_flight=waitroom.taken,
        connections=service.open_connections,
        tasks=_count_tasks(),
        upstream_connections=service.pool.open_count,
        overload=tuple(
            OverloadLevel(resource, overload.level_of(resource), use.used, use.limit)
            for resource, use in overload.uses.items()
        ),
        buffered=(overload.buffers.used, overload.buffers.limit),
        draining=service.draining.is_set(),
        log_lines_dropped=service.log.dropped,
        generation=service.generation.number,
        generations=len(service.generations),
        configured_at=service.generation.since,
        is_refusing=service.reloader is not None and service.reloader.refusal is not None,
        store=_of_store(service.membership),
        now=now,
    )


def all_upstreams(balancer: LoadBalancer) -> list[Upstream]:
    """All that may have requests."""
    return [*balancer.upstreams, *balancer.leaving]


def _failing(balancer: LoadBalancer) -> dict[tuple[str, str], bool]:
    """By model and kind of source; one of a kind is enough."""
    found: dict[tuple[str, str], bool] = {}
    for model in balancer.models.values():
        for source in balancer.discovery.report(model.id, model.config):
            key = (model.id, source["source"])
            found[key] = found.get(key, False) or bool(source["problems"])
    return found


def _of_store(membership: Membership | None) -> StoreLevels | None:
    if membership is None:
        return None
    return StoreLevels(
        is_up=not membership.is_alone, members=membership.members, misses=membership.misses
    )


def _count_tasks() -> int:
    if not trio.lowlevel.in_trio_run():
        return 0
    return trio.lowlevel.current_statistics().tasks_living
