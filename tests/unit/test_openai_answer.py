"""What engines answer: whole, broken or an error, in every dialect."""

from __future__ import annotations

import json

import orjson
import pytest
from attrs import astuple
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.openai_answer import (
    EngineError,
    NotAnAnswer,
    Usage,
    check_whole_answer,
    parse_error,
    parse_usage,
)
from citadel_gateway.wire.openai_request import Kind
from tests.support.json_values import ANY_JSON

steady = settings(deadline=None, derandomize=True)


def test_a_whole_answer_tells_its_usage() -> None:
    body = b'{"choices":[{}],"usage":{"prompt_tokens":3,"completion_tokens":5}}'

    assert check_whole_answer(Kind.CHAT, body) == Usage(3, 5)
    assert check_whole_answer(Kind.COMPLETIONS, b'{"choices":[{}]}') == Usage()
    assert check_whole_answer(Kind.EMBEDDINGS, b'{"data":[{}]}') == Usage()


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        (Kind.CHAT, b"", "an empty body"),
        (Kind.CHAT, b"<html>", "not JSON"),
        (Kind.CHAT, b'{"choices":[', "not JSON"),
        (Kind.CHAT, b"[]", "not an object"),
        (Kind.CHAT, b'{"choices":[]}', "an empty one"),
        (Kind.CHAT, b"{}", "no list of choices"),
        (Kind.CHAT, b'{"choices":{}}', "no list of choices"),
        (Kind.CHAT, b'{"data":[]}', "no list of choices"),
        (Kind.EMBEDDINGS, b'{"choices":[]}', "no list of data"),
        (Kind.CHAT, b"[" * 100_000, "not JSON"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_200_that_is_no_answer_is_noticed(kind: Kind, body: bytes, why: str) -> None:
    with pytest.raises(NotAnAnswer, match=why):
        check_whole_answer(kind, body)


def test_an_error_inside_a_200_is_an_error_with_its_own_status() -> None:
    body = b'{"error":{"message":"too hot","type":"server_error","code":503}}'

    with pytest.raises(EngineError) as caught:
        check_whole_answer(Kind.CHAT, body)
    assert astuple(caught.value) == (503, "too hot", "server_error", None, None)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}, Usage(3, 5)),
        ({"prompt_tokens": 3}, Usage(3, 0)),
        ({"prompt_tokens": -1, "completion_tokens": 10**12}, Usage()),
        ({"prompt_tokens": True, "completion_tokens": 1.5}, Usage()),
        ({"prompt_tokens": "3", "completion_tokens": None}, Usage()),
        (None, Usage()),
        ([], Usage()),
        ("many", Usage()),
    ],
    ids=repr,
)
def test_absent_and_absurd_counts_are_zero(usage: object, counted: Usage) -> None:
    assert parse_usage(usage) == counted


INVALID, SERVER = "invalid_request_error", "server_error"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            {"error": {"message": "bad n", "type": INVALID, "param": "n", "code": "bad"}},
            EngineError(400, "bad n", INVALID, "bad", "n"),
        ),
        (400, {"error": "bad n"}, EngineError(400, "bad n", INVALID, None, None)),
        (
            404,
            {"object": "error", "message": "no model", "type": "NotFound", "code": 404},
            EngineError(404, "no model", "NotFound", None, None),
        ),
        (500, {"detail": "oops"}, EngineError(500, "oops", SERVER, None, None)),
        (
            422,
            {"detail": [{"loc": ["body", "n"], "msg": "not an int"}]},
            EngineError(422, '[{"loc":["body","n"],"msg":"not an int"}]', INVALID, None, None),
        ),
        (500, b" engine is down\n", EngineError(500, "engine is down", SERVER, None, None)),
        (
            502,
            b"<html>Bad Gateway</html>",
            EngineError(
                502, "The upstream answered with status 502 and no explanation.", SERVER, None, None
            ),
        ),
        (
            500,
            b"",
            EngineError(
                500, "The upstream answered with status 500 and no explanation.", SERVER, None, None
            ),
        ),
        (
            500,
            b"17",
            EngineError(
                500, "The upstream answered with status 500 and no explanation.", SERVER, None, None
            ),
        ),
        (
            400,
            {"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}},
            EngineError(400, "too long", INVALID, "context_length_exceeded", "messages"),
        ),
        (
            400,
            {"message": "This model's maximum context length is 4096 tokens.", "type": "Bad"},
            EngineError(
                400,
                "This model's maximum context length is 4096 tokens.",
                INVALID,
                "context_length_exceeded",
                "messages",
            ),
        ),
        (429, {"error": {"code": 500, "message": "x"}}, EngineError(429, "x", INVALID, None, None)),
        (
            500,
            {"error": {"message": ""}},
            EngineError(500, "The upstream failed: {'message': ''}", SERVER, None, None),
        ),
    ],
    ids=[
        "OpenAI", "text", "old vLLM", "detail", "list of details", "plain text", "HTML", "empty",
        "number", "llama.cpp context", "vLLM context", "other code", "no message",
    ],
)  # fmt: skip
def test_errors_of_every_dialect_come_out_in_openais_terms(
    status: int, body: object, expected: EngineError
) -> None:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)

    assert astuple(parse_error(status, raw)) == astuple(expected)


def test_an_errors_body_has_all_four_keys() -> None:
    assert json.loads(EngineError(400, "m", "k", None, None).body()) == {
        "error": {"message": "m", "type": "k", "param": None, "code": None}
    }


@steady
@given(st.integers(400, 599), ANY_JSON.map(lambda v: json.dumps(v).encode()) | st.binary())
def test_no_body_makes_an_error_fail(status: int, body: bytes) -> None:
    error = parse_error(status, body)

    assert 400 <= error.status <= 599
    assert len(error.message) <= 4000
    error.body()
