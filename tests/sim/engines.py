"""Simulated engines: they answer by a seeded script, fail by it, and write down what they did."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio.abc
import attrs
import orjson
import trio

from citadel_gateway.io.dial import Origin
from tests.sim import speech
from tests.sim.draw import HostFault, HostPlan, JobFault, Prefill
from tests.sim.history import History
from tests.sim.scripts import (
    End,
    Hang,
    Order,
    Part,
    Pause,
    Say,
    Script,
    refuses_to_go_on,
    refuses_usage,
    script,
)
from tests.sim.speech import PLAIN, Answer, Event, Said, Voice
from tests.sim.wires import GatewayEnd, Wire, wire_pair
from tests.support.raw_client import parse_head, take_until

_COMMITS = {Said.CONTENT, Said.FINISH}
_SAY = re.compile(r"say ([^;]+);(.*)", re.DOTALL)


@attrs.define(eq=False)
class Job:
    """One request that an engine received: what it was, what became of it, and when.

    :param serial: tells which of two jobs of one instant was first.
    :param reused: over a connection that had carried another one before.
    :param answer: what it would say, and goes on with.
    :param events: sent, and complete.
    :param body: the whole answer, once it was sent; none of a stream.
    :param content_at: when the first event was sent that commits a stream.
    """

    name: str
    serial: int
    host: str
    request_id: str
    stream: bool
    usage: bool
    answer: Answer
    counts: bool
    reused: bool
    began: float
    script: Script
    fault: JobFault | None
    refused_usage: bool
    refused_to_go_on: bool
    ended: float | None = None
    end: End | None = None
    spoke: bool = False
    events: list[Event] = attrs.field(factory=list)
    spoke_at: list[float] = attrs.field(factory=list)
    body: bytes | None = None
    content_at: float | None = None

    @property
    def said(self) -> str:
        """The text of its stream until now, of the first choice."""
        return "".join(event.word for event in self.events if event.choice == 0)

    def say(self, events: tuple[Event, ...], now: float) -> None:
        self.events += events
        if self.content_at is None and any(e.said in _COMMITS for e in events):
            self.content_at = now

    def settle(self, end: End, now: float) -> None:
        """Only the first end counts."""
        if self.end is None:
            self.end, self.ended = end, now


@attrs.define(eq=False)
class _Connection:
    number: int
    wire: Wire
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    served: int = 0


@attrs.define(eq=False)
class Engine:
    """One engine behind the address *plan.host*.

    :param expects: the name of the model, as it has to be asked for here.
    """

    plan: HostPlan
    expects: str
    seed: int
    history: History
    nursery: trio.Nursery
    jobs: list[Job] = attrs.field(factory=list, init=False)
    complaints: list[str] = attrs.field(factory=list, init=False)
    trouble: HostFault | None = attrs.field(default=None, init=False)
    healed: bool = attrs.field(default=False, init=False)
    dials: int = attrs.field(default=0, init=False)
    lost: int = attrs.field(default=0, init=False)  # dials that failed, requests not looked at
    _connections: dict[int, _Connection] = attrs.field(factory=dict, init=False)
    _ends: list[GatewayEnd] = attrs.field(factory=list, init=False)

    @property
    def open_connections(self) -> int:
        """Those that the gateway has not closed."""
        return sum(end.is_open for end in self._ends)

    @property
    def working(self) -> int:
        return sum(job.end is None for job in self.jobs)

    def _note(self, what: str) -> None:
        self.history.note(self.plan.host, what)

    async def connect(self, _: Origin) -> anyio.abc.ByteStream:
        """The gateway dials."""
        self.dials += 1
        number = self.dials
        self.lost += 1
        await trio.sleep(self.plan.latency)
        match self.trouble:
            case HostFault.REFUSES | HostFault.DEAD:
                self._note("refuses a connection")
                raise ConnectionRefusedError("nothing listens there")
            case HostFault.SILENT:
                self._note("lets a connection hang")
                await trio.sleep_forever()
        self.lost -= 1
        gateway, wire = wire_pair(direct=self.plan.direct)
        connection = _Connection(number, wire)
        self._connections[connection.number] = connection
        self._ends.append(gateway)
        self.nursery.start_soon(self._serve, connection)
        return gateway

    async def live(self) -> None:
        """Its misfortunes, one after the other."""
        began = trio.current_time()
        for at, lasts, trouble in self.plan.troubles:
            await trio.sleep_until(began + at)
            self.trouble = trouble
            self._note(trouble.value)
            if trouble is HostFault.DEAD:
                self._die()
            await trio.sleep(lasts)
            self.trouble = None
            self._note("is well again")

    def heal(self) -> None:
        self.trouble, self.healed = None, True

    def _die(self) -> None:
        for connection in list(self._connections.values()):
            connection.scope.cancel()

    async def _serve(self, connection: _Connection) -> None:
        reset = True
        try:
            with connection.scope, suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                reset = await self._converse(connection)
        finally:
            del self._connections[connection.number]
            connection.wire.close(reset=reset)
            self.lost += connection.wire.dropped

    async def _converse(self, connection: _Connection) -> bool:
        """Whether the connection is to be reset in the end."""
        buffer = bytearray()
        while True:
            while (block := take_until(buffer, b"\r\n\r\n")) is None:
                if not (data := await connection.wire.receive_some()):
                    return False
                buffer += data
            start, fields = parse_head(block)
            headers = dict(fields)
            size = int(headers.get("content-length", "0"))
            while len(buffer) < size:
                if not (data := await connection.wire.receive_some()):
                    return False
                buffer += data
            body = bytes(buffer[:size])
            del buffer[:size]
            if buffer:
                self.complaints.append(f"{self.plan.host}: {bytes(buffer)!r} behind a request")
            connection.served += 1
            if start.startswith("GET "):
                if not await self._answer_probe(connection):
                    return False
                continue
            job = self._take_in(start, headers, body, reused=connection.served > 1)
            try:
                part = await self._perform(job, connection.wire)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                part = Part(End.LEFT)
                job.settle(End.LEFT, trio.current_time())
            finally:
                job.settle(End.KILLED, trio.current_time())
            if part is not None:
                if job.end is End.LEFT:
                    self._note(f"{job.name} sees that the gateway has left")
                return part.reset

    async def _answer_probe(self, connection: _Connection) -> bool:
        match self.trouble:
            case HostFault.DUMB:
                return not await connection.wire.is_left_within(1000.0)
            case HostFault.ILL:
                status = b"503 Loading"
            case _:
                status = b"200 OK"
        server = b"server: %b\r\n" % self.plan.server.encode() if self.plan.server else b""
        head = b"HTTP/1.1 %b\r\n%bcontent-length: 2\r\n\r\n{}"
        await connection.wire.send_all(head % (status, server))
        return True

    def _take_in(self, start: str, headers: dict[str, str], body: bytes, *, reused: bool) -> Job:
        method, path, _ = start.split(" ")
        asked = orjson.loads(body)
        request_id, given = _understand(asked)
        self._check(method, headers, asked, request_id)
        number = len(self.jobs)
        rng = random.Random(f"{self.seed} {self.plan.host} {number}")
        fault = None
        if not self.healed and rng.random() < self.plan.badness:
            fault = rng.choice(self.plan.faults)
        name = f"{self.plan.host}/{number}"
        order = Order(
            path=path.removeprefix("/v1"),
            job=name,
            request_id=request_id,
            stream=bool(asked.get("stream")),
            usage=bool((asked.get("stream_options") or {}).get("include_usage")),
            answer=self._answer(asked, request_id, given, Voice(f"~{name}", rng.randrange(5))),
            counts=self.plan.counts,
            packs=self.plan.packs,
        )
        think, gap = self.plan.think, self.plan.gap
        if rng.random() < 0.5:
            think *= rng.random() * 2
            gap *= rng.random() * 2
        refused = self.plan.refuses_usage and "stream_options" in asked
        will_not = bool(given) and "messages" in asked and self.plan.prefill is Prefill.REFUSES
        if self.healed:
            think, gap = min(think, 0.05), 0.0
        if refused:
            steps = refuses_usage()
        elif will_not:
            steps = refuses_to_go_on(rng)
        else:
            steps = script(order, fault, think, gap, rng)
        job = Job(
            name=name,
            serial=len(self.history),
            host=self.plan.host,
            request_id=request_id,
            stream=order.stream,
            usage=order.usage,
            answer=order.answer,
            counts=order.counts,
            reused=reused,
            began=trio.current_time(),
            script=steps,
            fault=fault,
            refused_usage=refused,
            refused_to_go_on=will_not and not refused,
        )
        self.jobs.append(job)
        begins = f"goes on with {request_id} behind {given!r}" if given else f"begins {request_id}"
        self._note(f"{name} {begins}" + (f": {fault.value}" if fault else ""))
        return job

    def _check(
        self, method: str, headers: dict[str, str], asked: dict[str, Any], request_id: str
    ) -> None:
        """What is wrong with how it is asked is written down."""
        expected = f"Bearer {self.plan.api_key}" if self.plan.api_key else None
        for what, is_so, should in (
            ("method", method, "POST"),
            ("request id", headers.get("x-request-id"), request_id),
            ("model", asked.get("model"), self.expects),
            ("authorization", headers.get("authorization"), expected),
        ):
            if is_so != should:
                self.complaints.append(f"{self.plan.host}: {what} is {is_so!r}, not {should!r}")

    def _answer(self, asked: dict[str, Any], request_id: str, given: str, own: Voice) -> Answer:
        """What this engine says: as others do, if asked to, and else in its *own* voice."""
        plan = self.plan
        choices, most = asked.get("n", 1), asked.get("max_tokens")
        voice = PLAIN if asked.get("temperature") == 0 and not plan.lies else own
        texts = [speech.text(request_id, plan.model, n, voice) for n in range(choices)]
        if given:
            rest = speech.goes_on(request_id, plan.model, given)
            if rest is None:
                self.complaints.append(f"{plan.host} was given what nobody says: {given!r}")
            if "messages" in asked and not self._can_go_on(asked):
                self.complaints.append(f"{plan.host} was asked to go on, and cannot: {given!r}")
            texts = [rest or ""]
        tokens = [speech.tokens(t, leading=plan.leading, begins=not given) for t in texts]
        return Answer(
            tokens=tuple(each[:most] for each in tokens),
            given=given,
            is_cut=most is not None and any(len(each) > most for each in tokens),
        )

    def _can_go_on(self, asked: dict[str, Any]) -> bool:
        """Whether it can be asked to go on, in this way."""
        match self.plan.prefill:
            case Prefill.FLAGGED:
                is_told = asked.get("continue_final_message") is True
                return is_told and asked.get("add_generation_prompt") is False
            case Prefill.IGNORES:
                return False
            case _:
                return True

    async def _perform(self, job: Job, wire: Wire) -> Part | None:
        """How to part with the connection; ``None`` keeps it."""
        for step in job.script.steps:
            match step:
                case Say(data, events, end):
                    if end is not None:
                        self._settle(job, end)
                    await wire.send_all(data)
                    job.spoke = True
                    job.say(events, trio.current_time())
                    job.spoke_at.append(trio.current_time())
                    if end is End.ANSWERED:
                        job.body = job.script.body
                case Pause(seconds):
                    if await wire.is_left_within(seconds):
                        job.settle(End.LEFT, trio.current_time())
                        return Part(End.LEFT)
                case Hang():
                    await wire.is_left_within(100_000.0)
                    job.settle(End.LEFT, trio.current_time())
                    return Part(End.LEFT)
                case Part(end):
                    self._settle(job, end)
                    return step
        return None

    def _settle(self, job: Job, end: End) -> None:
        if job.end is None:
            self._note(f"{job.name} is {end.value}")
        job.settle(end, trio.current_time())


def _understand(asked: dict[str, Any]) -> tuple[str, str]:
    """Which request it is, and what was said already."""
    given = ""
    if (messages := asked.get("messages")) is not None:
        content = messages[0]["content"]
        if messages[-1]["role"] == "assistant":
            given = messages[-1]["content"]
    else:
        content = asked.get("prompt", asked.get("input"))
        content = content[0] if isinstance(content, list) else content
    found = _SAY.fullmatch(content)
    if found is None:
        return str(content), given
    return found[1], given or found[2]


@attrs.define(eq=False)
class Fleet:
    """All engines, by the name of their host."""

    engines: dict[str, Engine]

    def __iter__(self) -> Iterator[Engine]:
        return iter(self.engines.values())

    @property
    def jobs(self) -> list[Job]:
        return [job for engine in self for job in engine.jobs]

    async def connect(self, origin: Origin) -> anyio.abc.ByteStream:
        return await self.engines[origin.host].connect(origin)

    def each(self, do: Callable[[Engine], object]) -> None:
        for engine in self:
            do(engine)
