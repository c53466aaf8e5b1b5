"""The three endpoints that do work, and the line in the ledger that each request leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import trio

from citadel_gateway.sim.canned import canned
from citadel_gateway.sim.engine import Engine, silence
from citadel_gateway.sim.exchange import Exchange, Refusal
from citadel_gateway.sim.faults import (
    CANNED,
    AbortConnection,
    Fault,
    FaultKind,
    Faults,
    FaultStruck,
)
from citadel_gateway.sim.fields import Fields, parse_fields
from citadel_gateway.sim.job import Job, make_job
from citadel_gateway.sim.ledger import Ending, Entry, Ledger
from citadel_gateway.sim.requests import EmbeddingRequest, parse_completion, parse_embedding
from citadel_gateway.sim.streamed import StreamWriter
from citadel_gateway.sim.vectors import as_base64, embed
from citadel_gateway.sim.whole import WholeWriter


@attrs.define(eq=False)
class Work:
    """:param wall: where ``created`` comes from, in seconds since 1970."""

    engine: Engine
    faults: Faults
    ledger: Ledger
    wall: Callable[[], float]

    async def handle(self, exchange: Exchange, body: bytes) -> None:
        """Answer one request.  Raises `Refusal` and `FaultStruck`, after noting them."""
        notes, arrived = _Notes(), trio.current_time()
        try:
            await self._serve(exchange, body, notes)
            notes.ended = Ending.FINISHED
        except Refusal:
            notes.ended = Ending.REJECTED
            raise
        except FaultStruck:
            notes.ended = Ending.FAILED
            raise
        finally:
            seconds = trio.current_time() - arrived
            who, where = exchange.request_id, exchange.path
            self.ledger.record(Entry(id=who, path=where, seconds=seconds, **notes.as_fields()))

    async def _serve(self, exchange: Exchange, body: bytes, notes: _Notes) -> None:
        fields = parse_fields(body)
        model = fields.raw.get("model")
        fault = self.faults.choose(exchange.path, model if isinstance(model, str) else None)
        if fault is not None:
            notes.fault = fault.kind
            await strike_early(exchange, fault)
        if exchange.path == "/v1/embeddings":
            await self._embed(exchange, fields, notes)
        else:
            await self._complete(exchange, fields, notes, fault)

    async def _complete(
        self, exchange: Exchange, fields: Fields, notes: _Notes, fault: Fault | None
    ) -> None:
        profile = self.engine.profile
        chat = exchange.path == "/v1/chat/completions"
        request = parse_completion(fields, profile, chat=chat)
        job = notes.job = make_job(
            request,
            model=profile.model,
            request_id=exchange.request_id,
            created=int(self.wall()),
        )
        says_done = fault is None or fault.kind is not FaultKind.NO_DONE
        await self.engine.complete(
            job,
            StreamWriter(exchange, job, says_done)
            if request.stream
            else WholeWriter(exchange, job),
            fault,
        )

    async def _embed(self, exchange: Exchange, fields: Fields, notes: _Notes) -> None:
        request = parse_embedding(fields, self.engine.profile)
        notes.embedded = sum(map(len, request.inputs))
        await self.engine.embed(request)
        await exchange.send_json(_embeddings(request, self.engine.profile.model))


@attrs.define
class _Notes:
    """What is known of a request so far."""

    ended: Ending = Ending.ABORTED
    fault: str | None = None
    job: Job | None = None
    embedded: int = 0

    def as_fields(self) -> dict[str, Any]:
        known: dict[str, Any] = {"ended": self.ended, "fault": self.fault}
        if self.job is None:
            return known | {"prompt_tokens": self.embedded}
        return known | {
            "prompt_tokens": self.job.prompt_tokens,
            "cached_tokens": self.job.cached,
            "completion_tokens": self.job.made,
        }


async def strike_early(exchange: Exchange, fault: Fault) -> None:
    """Act out a fault that comes before the answer; raises `FaultStruck` if it took its place."""
    if fault.kind is FaultKind.HANG:
        await silence(fault.delay)
    if fault.kind not in CANNED:
        return
    await trio.sleep(fault.delay)
    answer = canned(fault)
    await exchange.send_head(
        answer.status, answer.content_type, length=answer.promised, headers=answer.headers
    )
    if answer.is_short:
        await exchange.send_chunk(answer.body)
        raise AbortConnection
    await exchange.end(answer.body)
    raise FaultStruck


def _embeddings(request: EmbeddingRequest, model: str) -> dict[str, Any]:
    vectors = [embed(model, tokens, request.width) for tokens in request.inputs]
    encode = as_base64 if request.base64 else list
    tokens = sum(map(len, request.inputs))
    return {
        "object": "list",
        "model": model,
        "simulated": True,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
