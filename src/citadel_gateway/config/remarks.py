"""What is right in a configuration, and hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from citadel_gateway.config.schema import GatewayConfigSchema

LEAST_MEMORY = 0.25
"""GiB for a worker: a fourth of it is used by one that has nothing to do, and use is looked at
twice a second, in which large bodies can take as much again."""


def remarks(config: GatewayConfigSchema) -> Iterator[str]:
    """One line each, with the path of the option."""
    each = config.performance.memory_limit_gb / config.workers
    if each < LEAST_MEMORY:
        whose = "the one worker" if config.workers == 1 else f"each of {config.workers} workers"
        yield (
            f"performance.memory_limit_gb: leaves {each:.3g} GiB to {whose}; "
            f"with less than {LEAST_MEMORY:g} a burst may exceed it before requests are refused"
        )
