"""What the engine does with its time: wait for a place, read the prompt, make tokens.

The first token comes with the end of the prompt; each further one takes
:meth:`EngineProfile.token_seconds` of the batch as it is then.  Prompts are read side by side
without slowing each other, which flatters the engine under heavy load.
"""

from __future__ import annotations

import random
from typing import Protocol

import attrs
import trio

from citadel_gateway.sim.exchange import Refusal
from citadel_gateway.sim.faults import Fault, FaultKind
from citadel_gateway.sim.job import Job
from citadel_gateway.sim.metrics import EngineMetrics
from citadel_gateway.sim.prefix_cache import PrefixCache
from citadel_gateway.sim.profile import EngineProfile
from citadel_gateway.sim.requests import EmbeddingRequest
from citadel_gateway.sim.scheduler import QueueFull, Scheduler, Ticket


class Writer(Protocol):
    """How an answer is told."""

    async def open(self) -> None:
        """The request is accepted."""

    async def begin(self) -> None:
        """The prompt is read; tokens follow."""

    async def tell(self, tokens: list[tuple[int, str]]) -> None:
        """The next token of each choice that has one."""

    async def strike(self, fault: Fault) -> None:
        """Act out *fault* in the middle; raises `FaultStruck` if that was the end."""

    async def close(self) -> None:
        """All is said."""


async def silence(seconds: float) -> None:
    """Say nothing for so long; 0 is for ever."""
    if seconds:
        await trio.sleep(seconds)
    else:
        await trio.sleep_forever()


@attrs.define(eq=False)
class Engine:
    profile: EngineProfile
    scheduler: Scheduler
    cache: PrefixCache
    metrics: EngineMetrics
    rng: random.Random

    async def complete(self, job: Job, writer: Writer, fault: Fault | None) -> None:
        """Run *job* to its end, telling *writer* as it goes.  Blocks while it queues."""
        arrived = trio.current_time()
        try:
            with self.scheduler.place() as ticket:
                await writer.open()
                await ticket.wait_called()
                await self._read_prompts(job, ticket)
                if fault is not None and fault.kind is FaultKind.SLOW_FIRST_TOKEN:
                    await trio.sleep(fault.delay)
                self.metrics.first_token(trio.current_time() - arrived)
                await writer.begin()
                await self._make_tokens(job, ticket, writer, fault)
                await writer.close()
        except QueueFull:
            raise _overloaded() from None
        except trio.Cancelled:
            self.metrics.ended("abort")
            raise
        self.metrics.ended(job.answers[0].finish_reason)

    async def embed(self, request: EmbeddingRequest) -> None:
        """Take the time that reading *request* takes; nothing is cached."""
        tokens = sum(map(len, request.inputs))
        try:
            with self.scheduler.place() as ticket:
                await ticket.wait_called()
                ticket.tokens = tokens
                await self._wait(self.profile.prefill_seconds(tokens))
        except QueueFull:
            raise _overloaded() from None
        self.metrics.prompt_read(tokens, 0, looked_up=False)

    async def _read_prompts(self, job: Job, ticket: Ticket) -> None:
        job.cached = sum(self.cache.match(prompt.tokens) for prompt in job.request.prompts)
        ticket.tokens = job.prompt_tokens
        await self._wait(self.profile.prefill_seconds(job.prompt_tokens - job.cached))
        self.metrics.prompt_read(job.prompt_tokens, job.cached)
        for prompt in job.request.prompts:
            self.cache.remember(prompt.tokens)

    async def _make_tokens(
        self, job: Job, ticket: Ticket, writer: Writer, fault: Fault | None
    ) -> None:
        strike_at = min(fault.after_tokens, job.steps) if fault else -1
        for step in range(job.steps + 1):
            if fault is not None and step == strike_at:
                await self._strike(fault, writer)
            if step == job.steps:
                return
            if step:
                await self._wait(self.profile.token_seconds(self.scheduler.running))
            tokens = job.tokens_at(step)
            job.made += len(tokens)
            ticket.tokens += len(tokens)
            self.metrics.tokens_made(len(tokens))
            await writer.tell(tokens)

    async def _strike(self, fault: Fault, writer: Writer) -> None:
        if fault.kind is FaultKind.STALL:
            await silence(fault.delay)
        else:
            await writer.strike(fault)

    async def _wait(self, seconds: float) -> None:
        if self.profile.jitter:
            seconds *= 1 + self.profile.jitter * (2 * self.rng.random() - 1)
        await trio.sleep(seconds)


def _overloaded() -> Refusal:
    return Refusal(
        "The engine's queue is full. Try again later.",
        503,
        "ServiceUnavailableError",
        headers=((b"retry-after", b"1"),),
    )
