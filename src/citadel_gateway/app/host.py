"""The gateway as the world sees it: one, however many processes it has.

Routes report and obey through a :class:`Host`.  A process that serves by itself is its own;
a worker's asks the supervisor, and through it all the others.
"""

from __future__ import annotations

from typing import Any, Protocol

import attrs

from citadel_gateway.app.operations import Operations, Order
from citadel_gateway.io.metrics import Metrics

Json = dict[str, Any]


class Host(Protocol):
    """Raises ``GatewayError`` where the others are not to be had."""

    async def metrics(self) -> bytes: ...

    def health(self, own: Json) -> Json:
        """The report of ``/health``, of which *own* is this process's."""
        ...

    async def status(self, own: Json) -> Json:
        """The report of ``/models/status``."""
        ...

    async def endpoints(self) -> Json: ...

    async def order(self, what: str, order: Order) -> Json:
        """Have an operator's wish carried out, see :meth:`Operations.carry_out`."""
        ...


@attrs.frozen
class Alone:
    """A process that serves by itself."""

    own_metrics: Metrics
    operations: Operations

    async def metrics(self) -> bytes:
        return await self.own_metrics.render()

    def health(self, own: Json) -> Json:
        return own

    async def status(self, own: Json) -> Json:
        return own

    async def endpoints(self) -> Json:
        return self.operations.show()

    async def order(self, what: str, order: Order) -> Json:
        return await self.operations.carry_out(what, order)
