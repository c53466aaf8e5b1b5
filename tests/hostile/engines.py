"""Engines for the lanes: each remembers what it was asked, and answers so that it can be checked.

What to answer is asked for by the request's `user` field: `stream` fields say how many events, how
large, how far apart.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import attrs
import trio

from tests.support.scripted_engine import (
    LedgerEntry,
    Script,
    ScriptedEngine,
    Step,
    hang,
    send,
    serve_tcp,
    sleep,
    status,
)

INFERENCE = {b"/v1/chat/completions", b"/v1/completions", b"/v1/embeddings"}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def digest(body: bytes) -> str:
    """What an engine answers to *body*, as text."""
    return hashlib.sha256(body).hexdigest()[:16]


@attrs.frozen
class Seen:
    body: bytes
    whole: bool  # whether the body arrived as promised


@attrs.define(eq=False)
class Lane:
    """A model of its own with an engine of its own: what the engine sees came over this lane."""

    model: str
    port: int = 0
    engine: ScriptedEngine = attrs.field(init=False)
    offences: list[str] = attrs.field(factory=list, init=False)
    _read: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.engine = ScriptedEngine(default=self._answer)

    async def start(self, nursery: trio.Nursery) -> None:
        self.port = await serve_tcp(self.engine, nursery)

    def take(self) -> list[bytes]:
        """The bodies of the POSTs that have arrived since the last call."""
        entries = [e for e in self.engine.ledger[self._read :] if e.method == "POST"]
        self.forget()
        return [entry.body for entry in entries]

    def forget(self) -> None:
        self._read = len(self.engine.ledger)
        if self._read > 2000 and not self.engine.in_flight:
            self.engine.ledger.clear()
            self._read = 0

    def _answer(self, entry: LedgerEntry) -> Script:
        headers = entry.headers
        if "transfer-encoding" in headers or headers.get("content-length") != str(len(entry.body)):
            self.offences.append(f"framed in an odd way upstream: {headers!r}")
        try:
            asked = entry.json
        except ValueError:
            self.offences.append(f"a body that is no JSON was forwarded: {entry.body[:200]!r}")
            return status(400, b"{}")
        text = digest(entry.body)
        plan = _plan(asked)
        if asked.get("stream"):
            return _stream(digest(str(asked.get("user")).encode()), plan)
        steps = [sleep(plan["delay"])] if plan.get("delay") else []
        if plan.get("hang"):
            steps.append(hang())
        filler = "x" * int(plan.get("size", 0))
        return Script([*steps, *_whole(entry.path, text + filler).steps])


def _plan(asked: Any) -> dict[str, Any]:
    """The `user` field is a string of JSON where a test wants something special."""
    user = asked.get("user")
    if not isinstance(user, str) or not user.startswith("{"):
        return {}
    try:
        plan = json.loads(user)
    except ValueError:  # a mutant's
        return {}
    return plan if isinstance(plan, dict) else {}


def _whole(path: str, text: str) -> Script:
    if path.endswith("/embeddings"):
        data = {
            "object": "list",
            "model": text,
            "data": [{"index": 0, "embedding": [0.5]}],
            "usage": {"prompt_tokens": 1},
        }
        return status(200, json.dumps(data).encode())
    choice = {"index": 0, "finish_reason": "stop", "text": text}
    if path.endswith("/chat/completions"):
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": text}}
    answer = {"id": "x", "object": "x", "choices": [choice]}
    return status(200, json.dumps(answer).encode())


def _stream(text: str, plan: dict[str, Any]) -> Script:
    count, gap = int(plan.get("events", 3)), float(plan.get("gap", 0))
    filler = "x" * int(plan.get("size", 0))
    steps = [send(_HEAD)]
    if filler:
        steps += [_token(text + filler), sleep(gap)] * count if gap else [_token(filler)] * count
    else:
        for i in range(count):
            steps += [sleep(gap if i else 0), _token(f"{text}.{i} ")]
    if plan.get("hang"):
        steps.append(hang())
    steps.append(_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    steps.append(send(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"))
    return Script(steps)


def _token(content: str) -> Step:
    return _event([{"index": 0, "delta": {"content": content}, "finish_reason": None}])


def _event(choices: list[Any]) -> Step:
    data = json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": choices})
    return send(_chunk(b"data: " + data.encode() + b"\n\n"))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
