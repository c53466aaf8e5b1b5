"""The process's own limits: looked at now and then, so that a request only reads an attribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import attrs
import trio

from citadel_gateway.config.schema import PerformanceConfig
from citadel_gateway.errors import GatewayError, overloaded
from citadel_gateway.io import descriptors, memory
from citadel_gateway.io.buffers import Buffers
from citadel_gateway.io.ticks import sleep_until_tick
from citadel_gateway.policy.watermarks import Level, Use, Watermark, come_again_in, is_near

MEMORY, DESCRIPTORS, BUFFERS = "memory", "descriptors", "buffers"
"""What there may be too little of; labels of metrics."""

_EVERY = 0.5  # seconds
_GIVES_BACK_EVERY = 5.0
_BUFFERS_SHARE = 8  # of the memory: a body may be there four times over while it is worked on


@attrs.frozen(kw_only=True)
class Sensors:
    """How the process is asked what it uses; replace them to run without a real process."""

    resident: Callable[[], int] = memory.resident
    cgroups: Callable[[], list[Use]] = memory.of_cgroups
    descriptors: Callable[[], Use] = descriptors.use
    give_back: Callable[[], None] = memory.give_back


@attrs.define(eq=False)
class Overload:
    """Watches memory and descriptors, and says what is given up because of them.

    :param on_level: told when the level of a resource has changed.
    :param on_change: told the highest level of all resources when that has changed.
    :param on_refusal: told what there was too little of, for each request that is refused.
    :param chance: a random number from 0 to 1.
    """

    sensors: Sensors
    on_level: Callable[[str, Level, Use], None]
    on_change: Callable[[Level], None]
    on_refusal: Callable[[str], None]
    chance: Callable[[], float]
    buffers: Buffers = attrs.field(factory=Buffers, init=False)
    is_refusing: bool = attrs.field(default=False, init=False)
    level: Level = attrs.field(default=Level.CALM, init=False)
    uses: dict[str, Use] = attrs.field(factory=dict, init=False)
    _memory_limit: float = attrs.field(default=float("inf"), init=False)
    _marks: dict[str, Watermark] = attrs.field(init=False)
    _gave_back_at: float = attrs.field(default=-float("inf"), init=False)

    def __attrs_post_init__(self) -> None:
        self._marks = {MEMORY: Watermark(), DESCRIPTORS: Watermark()}

    def limit_to(self, config: PerformanceConfig) -> None:
        """From now on."""
        self._memory_limit = config.memory_limit_gb * 2**30
        self.buffers.limit = config.max_buffered_bytes or max(
            self._memory_limit / _BUFFERS_SHARE, config.max_body_bytes
        )

    def level_of(self, resource: str) -> Level:
        return self._marks[resource].level

    async def run(self) -> NoReturn:
        """Look for ever."""
        while True:
            self.look(trio.current_time())
            await sleep_until_tick(_EVERY)

    def look(self, now: float) -> None:
        """See how much is used, and tell what has changed."""
        use = self._use_of_memory()
        if is_near(use.share) and now - self._gave_back_at >= _GIVES_BACK_EVERY:
            self._gave_back_at = now
            self.sensors.give_back()
            use = self._use_of_memory()
        self._observe(MEMORY, use)
        self._observe(DESCRIPTORS, self.sensors.descriptors())
        level = max(mark.level for mark in self._marks.values())
        if level is not self.level:
            self.level, self.is_refusing = level, level >= Level.REFUSING
            self.on_change(level)

    def _use_of_memory(self) -> Use:
        """That which is nearest to its limit: ours, or one of the control groups'."""
        own = Use(self.sensors.resident(), self._memory_limit)
        return max([own, *self.sensors.cgroups()], key=lambda use: use.share)

    def _observe(self, resource: str, use: Use) -> None:
        self.uses[resource] = use
        mark = self._marks[resource]
        if mark.observe(use.share):
            self.on_level(resource, mark.level, use)

    def refusal(self) -> GatewayError:
        """What a request is told while :attr:`is_refusing`."""
        return self._refuse(max(self._marks, key=self.level_of))

    def no_room(self) -> GatewayError:
        """What a request is told whose bytes find no room in :attr:`buffers`."""
        return self._refuse(BUFFERS)

    def _refuse(self, resource: str) -> GatewayError:
        self.on_refusal(resource)
        return overloaded(come_again_in(self.chance()))
