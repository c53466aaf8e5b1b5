"""Which of the servers that SRV records name are to be used, and how much each of them gets.

RFC 2782: of all that can be reached, those with the lowest priority number; among these, shares in
proportion to the weights, and a very small one for a weight of zero beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

_VERY_SMALL = 0.01  # of an average share


@attrs.frozen
class Service:
    """One SRV record."""

    priority: int
    weight: int
    port: int
    target: str

    @property
    def authority(self) -> str:
        return f"{self.target}:{self.port}"


@attrs.frozen
class Choice:
    """One that is to be used.

    :param weight: of those with the same priority the average is 1.
    :param is_stood_in_for: it is down, and so are its peers, so that others are used.
    """

    service: Service
    weight: float
    is_stood_in_for: bool = False


def read_service(record: str) -> Service | None:
    """From its presentation format; ``None`` if it says that there is no such service."""
    priority, weight, port, target = record.split()
    name = target.rstrip(".").lower()
    return Service(int(priority), int(weight), int(port), name) if name else None


def in_use(services: Sequence[Service], is_down: Callable[[Service], bool]) -> list[Choice]:
    """Those to be used.

    The next priority is used, too, as long as all before it are down: those before it are in use
    still, so that somebody looks when they are up again.
    """
    used: list[Choice] = []
    for priority in sorted({service.priority for service in services}):
        peers = [service for service in services if service.priority == priority]
        average = sum(service.weight for service in peers) / len(peers)
        used = [attrs.evolve(before, is_stood_in_for=True) for before in used]
        used += [
            Choice(s, max(s.weight / average, _VERY_SMALL) if average else 1.0)
            for s in sorted(peers, key=lambda s: s.authority)
        ]
        if not all(map(is_down, peers)):
            break
    return used
