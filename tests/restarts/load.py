"""Clients that never pause, and count everything that is not a whole and right answer."""

from __future__ import annotations

import json
from collections import Counter

import attrs
import trio

from tests.support.raw_client import NoResponseError, RawClient, http_request
from tests.support.scripted_engine import MODEL, LedgerEntry, Script, sleep, stream_chat, whole_chat

CHAT = "/v1/chat/completions"
WORDS = [f"w{n} " for n in range(30)]
_ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
_PATIENCE = 60.0
_MOST_KEPT = 20  # connections are made anew now and then in any case


def answer(entry: LedgerEntry) -> Script:
    """An engine's answer: streams take half a second, whole answers a few milliseconds."""
    if not entry.json.get("stream"):
        return Script([sleep(0.005), *whole_chat("ok").steps])
    steps = []
    for step in stream_chat(WORDS).steps:
        steps += [step, sleep(0.015)]
    return Script(steps)


@attrs.define
class Tally:
    """What became of the requests.

    :param recycled: connections that ended while they were idle, which every client expects.
    """

    answered: Counter[str] = attrs.field(factory=Counter)
    failed: Counter[str] = attrs.field(factory=Counter)
    recycled: int = 0
    slowest: float = 0.0
    stopping: bool = False

    def __str__(self) -> str:
        parts = [f"{count} {kind}" for kind, count in sorted(self.answered.items())]
        bad = sum(self.failed.values())
        text = f"{', '.join(parts)}; failed: {bad}, slowest {self.slowest:.2f} s"
        return text + "".join(f"\n  {count} x {why}" for why, count in self.failed.items())


@attrs.define(eq=False)
class Load:
    """*fresh* clients connect for each request, *kept* ones as rarely as may be."""

    port: int
    fresh: int = 4
    kept: int = 4
    streams: int = 6
    tally: Tally = attrs.field(factory=Tally)

    async def run(self) -> None:
        """Ask until the tally says that it stops; then let everything come to its end."""
        counts = {"fresh": self.fresh, "kept": self.kept, "stream": self.streams}
        async with trio.open_nursery() as nursery:
            for kind, count in counts.items():
                for number in range(count):
                    nursery.start_soon(self._keep_asking, kind, number)

    async def _keep_asking(self, kind: str, number: int) -> None:
        client: RawClient | None = None
        asked = 0
        while not self.tally.stopping:
            began = trio.current_time()
            try:
                with trio.fail_after(_PATIENCE):
                    if client is None:
                        client, asked = await RawClient.connect(self.port), 0
                    keep = await self._ask(client, kind, is_reused=asked > 0)
                    asked += 1
            except (OSError, NoResponseError, trio.BrokenResourceError, trio.TooSlowError) as exc:
                self.tally.failed[f"{kind}: {exc!r}"] += 1
                keep = False
            self.tally.slowest = max(self.tally.slowest, trio.current_time() - began)
            if client is not None and (not keep or kind == "fresh" or asked >= _MOST_KEPT):
                await client.aclose()
                client = None
            await trio.sleep(0.001 * (number % 4))
        if client is not None:
            await client.aclose()

    async def _ask(self, client: RawClient, kind: str, *, is_reused: bool) -> bool:
        """One request; returns whether the connection may be used again."""
        stream = kind == "stream"
        try:
            await client.send(http_request("POST", CHAT, {**_ASK, "stream": stream}))
            response = await client.read_response("POST")
        except (NoResponseError, trio.BrokenResourceError):
            if is_reused and client.ended != "rst":
                self.tally.recycled += 1
                return False
            raise
        if response.status != 200:
            self.tally.failed[f"{kind}: {response.status} {response.body[:200]!r}"] += 1
        elif not response.complete or (stream and not _is_whole(response.body)):
            self.tally.failed[f"{kind}: cut"] += 1
        else:
            self.tally.answered[kind] += 1
        return response.complete and response.header("connection") != "close"


def _is_whole(body: bytes) -> bool:
    """Every word once, in order, and the end behind them."""
    *events, last = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return last == b"[DONE]" and [d["content"] for d in deltas if d.get("content")] == WORDS
