"""The engine's own controls under /sim/: what went wrong, and what shall."""

from __future__ import annotations

import attrs
import orjson

from citadel_gateway.sim.exchange import Exchange, Handler, Refusal
from citadel_gateway.sim.faults import Faults, parse_faults
from citadel_gateway.sim.fields import parse_json
from citadel_gateway.sim.ledger import Ledger
from citadel_gateway.sim.scheduler import Scheduler


@attrs.define(eq=False)
class Control:
    scheduler: Scheduler
    ledger: Ledger
    faults: Faults

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {
            "/sim/ledger": {"GET": self._ledger},
            "/sim/faults": {"GET": self._tell, "PUT": self._replace, "DELETE": self._clear},
        }

    async def _ledger(self, exchange: Exchange, _: bytes) -> None:
        counts = ("running", "waiting", "finished", "aborted", "rejected")
        found = {name: getattr(self.scheduler, name) for name in counts}
        await exchange.send_json(found | {"entries": self.ledger.as_json()})

    async def _tell(self, exchange: Exchange, _: bytes) -> None:
        await exchange.send_whole(200, b"application/json", orjson.dumps(self.faults.as_json()))

    async def _replace(self, exchange: Exchange, body: bytes) -> None:
        try:
            self.faults.replace(parse_faults(parse_json(body)))
        except (TypeError, ValueError) as exc:  # attrs puts its message first
            raise Refusal(f"These faults make no sense: {exc.args[0]}") from exc
        await self._tell(exchange, body)

    async def _clear(self, exchange: Exchange, body: bytes) -> None:
        self.faults.clear()
        await self._tell(exchange, body)
