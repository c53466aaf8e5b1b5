"""Clients of every kind, who know what became of each of their requests, and whose fault it was."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import attrs
import trio

from tests.many.ledger import Told
from tests.support.raw_client import Headers, NoResponseError, RawClient, RawResponse, http_request
from tests.support.scripted_engine import MODEL, LedgerEntry
from tests.support.several import ASK, CHAT, HasPort

QUICK = "quick"  # a model whose engine answers at once, and has room for all
_MOST_KEPT = 50  # requests on a connection
_PATIENCE = 30.0

Outcome = Literal[
    "running", "answered", "limited", "unlucky", "failed", "left", "cut", "recycled", "cannot be"
]


@attrs.frozen(kw_only=True)
class Kind:
    """How a client asks, again and again.

    :param words: of an answer.
    :param reads: events of a stream after which it hangs up, if it does not read on.
    :param pause: seconds between an answer and the next request.
    """

    name: str
    count: int
    pause: float
    key: str = "free"
    model: str = MODEL
    words: int = 3
    stream: bool = False
    temperature: float = 1.0
    reads: float = math.inf
    priority: str = "default"

    def request(self, name: str) -> bytes:
        body: dict[str, Any] = {**ASK, "model": self.model, "max_tokens": self.words}
        body |= {"stream": self.stream, "temperature": self.temperature}
        headers: Headers = [
            ("authorization", f"Bearer {self.key}"),
            ("x-citadel-priority", self.priority),
            ("x-request-id", name),
        ]
        return http_request("POST", CHAT, body, headers)


@attrs.define(eq=False)
class Request:
    """Of one client.

    :param why: what happened, if it is none of what may.
    """

    name: str
    kind: Kind
    began: float
    ended: float = math.inf
    outcome: Outcome = "running"
    why: str = ""

    @property
    def told(self) -> Told:
        status = {"answered": 200, "limited": 429}.get(self.outcome, 0)
        return Told(self.kind.key, status, self.began, self.ended)


def words(count: int) -> list[str]:
    return [f"w{n} " for n in range(count)]


@attrs.define(eq=False)
class Callers:
    """All of them.

    :param several: each client stays with one of these gateways.
    :param doomed: our ends of connections with workers that were killed.
    :param gone: names of requests whose clients hung up.
    """

    several: Sequence[HasPort]
    requests: dict[str, Request] = attrs.field(factory=dict)
    doomed: set[int] = attrs.field(factory=set)
    connected: set[int] = attrs.field(factory=set)
    gone: set[str] = attrs.field(factory=set)
    stopping: bool = False

    async def run(self, kinds: Iterable[Kind], within: float = math.inf) -> None:
        """Until they are to stop, or *within* seconds; all requests come to their end."""
        until = trio.current_time() + within
        async with trio.open_nursery() as nursery:
            for kind in kinds:
                for number in range(kind.count):
                    gateway = self.several[number % len(self.several)]
                    nursery.start_soon(self._keep_asking, gateway, kind, until)

    def of(self, key: str) -> list[Told]:
        """What the clients with *key* were let through, and when."""
        told = [r.told for r in self.requests.values() if r.kind.key == key]
        return [each for each in told if each.status == 200]

    def outcomes(self) -> Counter[str]:
        return Counter(request.outcome for request in self.requests.values())

    async def _keep_asking(self, gateway: HasPort, kind: Kind, until: float) -> None:
        while not self.stopping and trio.current_time() < until:
            async with await RawClient.connect(gateway.port) as client:
                port = client.stream.socket.getsockname()[1]  # type: ignore[attr-defined]
                self.doomed.discard(port)  # the one who had it is long gone
                self.connected.add(port)
                try:
                    for asked in range(_MOST_KEPT):
                        if self.stopping or trio.current_time() >= until:
                            break
                        if not await self._ask(client, port, kind, is_reused=asked > 0):
                            break
                        await trio.sleep(kind.pause)
                finally:
                    self.connected.discard(port)

    async def _ask(self, client: RawClient, port: int, kind: Kind, *, is_reused: bool) -> bool:
        """One request; whether another one may follow on the connection."""
        name = f"{kind.name}-{len(self.requests)}"
        request = Request(name, kind, trio.current_time())
        self.requests[name] = request
        keep = False
        try:
            with trio.fail_after(_PATIENCE):
                await client.send(kind.request(name))
                keep = await self._read(client, request)
        except (NoResponseError, trio.BrokenResourceError) as exc:
            # A connection may end while it is idle, and a request be on its way meanwhile.
            request.outcome = "recycled" if is_reused and client.ended != "rst" else "cannot be"
            request.why = repr(exc)
        except trio.TooSlowError:
            request.outcome, request.why = "cannot be", "no end in sight"
        if port in self.doomed and request.outcome in ("recycled", "cannot be"):
            request.outcome = "cut"
        request.ended = min(request.ended, trio.current_time())
        return keep

    async def _read(self, client: RawClient, request: Request) -> bool:
        head = await client.read_head("POST")
        events: list[str] = []
        body = b""
        if request.kind.stream and head.status == 200:
            stream = client.read_events(head)
            async for event in stream:
                events.append(event)
                if len(events) >= request.kind.reads:
                    await self._hang_up(client, request)
                    return False
        else:
            while piece := await client.read_piece():
                body += piece
        request.ended = trio.current_time()
        request.outcome, request.why = _judged(request.kind, head, body, events, client.complete)
        return client.complete and head.header("connection") != "close"

    async def _hang_up(self, client: RawClient, request: Request) -> None:
        self.gone.add(request.name)
        request.ended, request.outcome = trio.current_time(), "left"
        if len(self.gone) % 2:
            await client.reset()


def _judged(
    kind: Kind, head: RawResponse, body: bytes, events: list[str], complete: bool
) -> tuple[Outcome, str]:
    said = [json.loads(event) for event in events if event != "[DONE]"]
    if said and "error" in said[-1] and events[-1] != "[DONE]":
        return "failed", events[-1][:300]
    if not complete:
        return "cannot be", f"cut after {len(body)} bytes, {events[-1:]}"
    if head.status == 429 and kind.key != "free":
        return "limited", ""
    if head.status == 502:
        return "unlucky", f"{body[:300]!r}"
    if head.status != 200:
        return "cannot be", f"{head.status} {body[:300]!r}"
    if not kind.stream:
        right = json.loads(body)["choices"][0]["message"]["content"] == "ok"
        return ("answered", "") if right else ("cannot be", f"{body[:300]!r}")
    got = [c["delta"].get("content") for each in said for c in each.get("choices", ())]
    if events[-1] == "[DONE]" and [word for word in got if word] == words(kind.words):
        return "answered", ""
    return "cannot be", f"a stream of {got} and {events[-1]!r}"


def accounts(
    requests: Iterable[Request],
    runs: Iterable[LedgerEntry],
    dark: Sequence[tuple[float, float]],
    patience: float,
) -> tuple[list[str], float]:
    """What does not balance between clients and engines, in words; and how long after its client's
    departure an engine has heard of it, at the most.

    :param dark: from when to when an engine was away; who meets two such times may have tried both
        engines in vain.
    :param patience: seconds in which it has to.
    """
    found: dict[str, list[LedgerEntry]] = {}
    for run in runs:
        found.setdefault(run.request_id, []).append(run)
    complaints, latest = [], 0.0
    for request in requests:
        mine = found.pop(request.name, [])
        ends = [run.ended for run in mine]
        if request.outcome in ("running", "cannot be"):
            complaints.append(f"{request.name} {request.outcome}: {request.why}")
        if request.outcome in ("recycled", "limited") and mine:
            complaints.append(f"{request.name} was {request.outcome} and executed")
        if request.outcome == "answered" and "answered" not in ends:
            complaints.append(f"{request.name} was answered by nobody")
        if request.outcome == "failed" and "stopped" not in ends:
            complaints.append(f"{request.name} failed, and no engine was killed: {request.why}")
        met = sum(start <= request.ended and request.began <= end for start, end in dark)
        if request.outcome == "unlucky" and met < 2:
            complaints.append(f"{request.name} met {met} dead engines: {request.why}")
        if len(mine) > 1 + ends.count("stopped"):
            complaints.append(f"{request.name} was executed by {ends}")
        if request.outcome == "left":
            late = [_hears(run, request) for run in mine]
            latest = max([latest, *late])
            if any(each > patience for each in late):
                complaints.append(f"{request.name}: {ends}, heard of it {max(late):.2f} s later")
    complaints += [f"{name}: nobody asked for it" for name in found]
    return complaints, latest


def _hears(run: LedgerEntry, request: Request) -> float:
    """Seconds; an answer to somebody who has left has come to its end, and nobody told of it."""
    if run.ended == "stopped":
        return 0.0
    if run.ended == "answered" or run.client_left_at is None:
        return math.inf
    return run.client_left_at - request.ended
