"""A whole answer made of a stream's events is the one that the engine would have given."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from citadel_gateway.wire.assembly import Assembly
from citadel_gateway.wire.openai_request import Kind
from tests.support.canonical_engine import Canonical, Chunk, usage_chunk


def assemble(*chunks: Chunk, kind: Kind = Kind.CHAT) -> Any:
    assembly = Assembly(kind)
    for chunk in chunks:
        assembly.add(orjson.loads(orjson.dumps(chunk)))
    return orjson.loads(assembly.body())


def said(index: int = 0, finish: str | None = None, **delta: Any) -> Chunk:
    return {"id": "x", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def test_text_is_joined_and_the_rest_is_told_once() -> None:
    answer = assemble(*Canonical(("The", " sea", " é"), "llamacpp").chunks("one"))

    assert answer == {
        "id": "one", "object": "chat.completion", "created": 3, "model": "m-one",
        "system_fingerprint": "b-one",
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "The sea é"},
            "logprobs": None, "finish_reason": "stop",
        }],
    }  # fmt: skip


def test_a_completion_is_assembled() -> None:
    chunks = Canonical(("The", " sea"), "completions").chunks("one")
    answer = assemble(*chunks, kind=Kind.COMPLETIONS)

    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "The sea", "logprobs": None, "finish_reason": "stop"}
    ]


def test_choices_come_in_their_order_however_they_are_mixed() -> None:
    answer = assemble(
        said(1, content="b"), said(0, content="a"), said(1, "length", content="B"), said(0, "stop")
    )

    choices = [(c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]
    assert choices == [("a", "stop"), ("bB", "length")]


def test_tool_calls_are_put_together_by_their_index() -> None:
    def call(index: int, arguments: str, **extra: Any) -> dict[str, Any]:
        return {"index": index, "function": {**extra, "arguments": arguments}}

    answer = assemble(
        said(role="assistant", content=None),
        said(tool_calls=[{**call(0, "", name="f"), "id": "1", "type": "function"}]),
        said(tool_calls=[call(0, '{"a"')]),
        said(tool_calls=[{**call(1, "{}", name="g"), "id": "2", "type": "function"}]),
        said(tool_calls=[call(0, ":1}")]),
        said(finish="tool_calls"),
    )

    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_reasoning_and_log_probabilities_grow() -> None:
    first = {**said(reasoning_content="h"), "timings": {"n": 1}}
    first["choices"][0]["logprobs"] = {"content": [{"token": "h"}]}
    second = {**said(reasoning_content="m"), "timings": {"n": 2}}
    second["choices"][0]["logprobs"] = {"content": [{"token": "m"}]}
    answer = assemble(first, second, said(content="!"), usage_chunk("x", 1, 3))

    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "!", "reasoning_content": "hm"}
    assert choice["logprobs"] == {"content": [{"token": "h"}, {"token": "m"}]}
    assert answer["timings"] == {"n": 2}


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": None},
        {"choices": [None, 7, {"index": "x", "delta": None}]},
        said(tool_calls=[None]),
        said(tool_calls="no"),
    ],
    ids=str,
)
def test_nonsense_does_no_harm(chunk: Chunk) -> None:
    answer = assemble(said(content="a"), chunk, said(content="b", finish="stop"))

    assert answer["choices"][0]["message"]["content"] == "ab"
