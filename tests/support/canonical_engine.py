"""Engines with one answer to everything, which they can begin anywhere: for streams that break."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from tests.support import scripted_engine as engines
from tests.support.scripted_engine import LedgerEntry, Script, Step, send

Chunk = dict[str, Any]


def _chunk(ident: str, kind: str, choices: list[Any], **extra: Any) -> Chunk:
    return {
        "id": ident, "object": kind, "created": len(ident), "model": f"m-{ident}",
        "choices": choices, **extra,
    }  # fmt: skip


def _delta(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> list[Any]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **extra}]


def _vllm(ident: str, tokens: Sequence[str], finish: str) -> list[Chunk]:
    kind = "chat.completion.chunk"
    return [
        _chunk(ident, kind, _delta({"role": "assistant", "content": ""}), prompt_token_ids=None),
        *[_chunk(ident, kind, _delta({"content": token}), token_ids=None) for token in tokens],
        _chunk(ident, kind, _delta({"content": ""}, finish, stop_reason=None)),
    ]


def _sglang(ident: str, tokens: Sequence[str], finish: str) -> list[Chunk]:
    kind, empty = "chat.completion.chunk", {"reasoning_content": None, "tool_calls": None}
    return [
        _chunk(ident, kind, _delta({"role": "assistant", "content": "", **empty})),
        *[
            _chunk(ident, kind, _delta({"role": None, "content": token, **empty}))
            for token in tokens
        ],
        _chunk(ident, kind, _delta({"role": None, "content": None, **empty}, finish)),
    ]


def _llamacpp(ident: str, tokens: Sequence[str], finish: str) -> list[Chunk]:
    def chunk(delta: dict[str, Any], end: str | None = None) -> Chunk:
        return {
            "choices": [{"finish_reason": end, "index": 0, "delta": delta}], "created": 7,
            "id": ident, "model": "gguf", "system_fingerprint": f"b-{ident}",
            "object": "chat.completion.chunk",
        }  # fmt: skip

    role = chunk({"role": "assistant", "content": None})
    return [role, *[chunk({"content": token}) for token in tokens], chunk({}, finish)]


def _ollama(ident: str, tokens: Sequence[str], finish: str) -> list[Chunk]:
    kind, role = "chat.completion.chunk", "assistant"
    return [
        *[_chunk(ident, kind, _delta({"role": role, "content": token})) for token in tokens],
        _chunk(ident, kind, _delta({"role": role, "content": ""}, finish)),
    ]


def _completions(ident: str, tokens: Sequence[str], finish: str) -> list[Chunk]:
    def chunk(text: str, end: str | None = None) -> Chunk:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": end}
        return _chunk(ident, "text_completion", [choice])

    return [*[chunk(token) for token in tokens[:-1]], chunk("".join(tokens[-1:]), finish)]


SHAPES: dict[str, Callable[[str, Sequence[str], str], list[Chunk]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llamacpp": _llamacpp,
    "ollama": _ollama,
    "completions": _completions,
}


def usage_chunk(ident: str, prompt: int, completion: int) -> Chunk:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return _chunk(ident, "chunk", [], usage={**usage, "total_tokens": prompt + completion})


def encode(chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


@attrs.frozen
class Canonical:
    """Knows one text.  Given the beginning of it, it says the rest; else all of it."""

    tokens: tuple[str, ...]
    shape: str = "vllm"
    prompt: int = 11  # tokens of every prompt, without what it is given of the answer

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def rest(self, given: str) -> list[str]:
        """The tokens that follow on *given*; the first may be a part of one."""
        assert self.text.startswith(given), (given, self.text)
        at, rest = 0, []
        for token in self.tokens:
            if at + len(token) > len(given):
                rest.append(token[max(0, len(given) - at) :])
            at += len(token)
        return rest

    def given(self, entry: LedgerEntry) -> str:
        """What the request says of the answer."""
        if "prompt" in entry.json:
            prompt: str = entry.json["prompt"]
            return prompt.removeprefix("Once")
        last = entry.json["messages"][-1]
        return last["content"] if last["role"] == "assistant" else ""

    def chunks(self, ident: str, given: str = "", most: int | None = None) -> list[Chunk]:
        rest = self.rest(given)
        cut = most is not None and most < len(rest)
        said = rest[:most] if cut else rest
        spent = len(self.tokens) - len(rest)
        return [
            *SHAPES[self.shape](ident, said, "length" if cut else "stop"),
            usage_chunk(ident, self.prompt + spent, len(said)),
        ]

    def answer(self, ident: str) -> Callable[[LedgerEntry], Script]:
        """A whole answer."""

        def script(entry: LedgerEntry) -> Script:
            return stream(self._asked(ident, entry), end=b"data: [DONE]\n\n")

        return script

    def breaks(self, ident: str, after: int, *how: Step) -> Callable[[LedgerEntry], Script]:
        """An answer that comes to nothing *after* so many events."""

        def script(entry: LedgerEntry) -> Script:
            return stream(self._asked(ident, entry)[:after], *how)

        return script

    def refuses(self, ident: str) -> Callable[[LedgerEntry], Script]:
        """A whole answer, but only to those who give it no beginning."""

        def script(entry: LedgerEntry) -> Script:
            if self.given(entry):
                message = b"the last message must be the user's"
                return engines.status(400, b'{"error": {"message": "%b"}}' % message)
            return self.answer(ident)(entry)

        return script

    def _asked(self, ident: str, entry: LedgerEntry) -> list[Chunk]:
        most = entry.json.get("max_tokens")
        chunks = self.chunks(ident, self.given(entry), most)
        return chunks if "stream_options" in entry.json else chunks[:-1]


def stream(chunks: Sequence[Chunk], *how: Step, end: bytes = b"") -> Script:
    """A stream of *chunks*, each in a chunk of its own; without *end* or *how*, it just closes."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    steps = [send(head), *[send(_framed(encode(chunk))) for chunk in chunks]]
    if end:
        return Script([*steps, send(_framed(end)), send(b"0\r\n\r\n")])
    return Script([*steps, *(how or (engines.close(),))])


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
