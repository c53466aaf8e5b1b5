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
    EventKind,
    NotAnAnswer,
    StreamReader,
    Usage,
    check_whole_answer,
    parse_error,
    parse_usage,
)
from citadel_gateway.wire.openai_request import Kind
from citadel_gateway.wire.sse import encode_event

steady = settings(deadline=None, derandomize=True)

QUIET, CONTENT, USAGE = EventKind.QUIET, EventKind.CONTENT, EventKind.USAGE
DONE, MALFORMED = EventKind.DONE, EventKind.MALFORMED
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "object", "choices", "delta", "usage", "message", "code", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


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


def chunk(*choices: object, **extra: object) -> bytes:
    return encode_event(orjson.dumps({"choices": choices, **extra}))


def delta(index: int = 0, finish: str | None = None, **fields: object) -> dict[str, object]:
    return {"index": index, "delta": fields, "finish_reason": finish}


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b": ping\n\n", QUIET),
        (b"event: x\n\n", QUIET),
        (chunk(delta(role="assistant")), QUIET),
        (chunk(delta(role="assistant", content="")), QUIET),
        (chunk(delta(role="assistant", content=None, tool_calls=[])), QUIET),
        (chunk(delta()), QUIET),
        (chunk(), QUIET),
        (encode_event(b"{}"), QUIET),
        (chunk(None, 7, "x"), QUIET),
        (chunk(delta(content="a")), CONTENT),
        (chunk(delta(role="assistant", content="a")), CONTENT),
        (chunk(delta(reasoning_content="hm")), CONTENT),
        (chunk(delta(tool_calls=[{"index": 0}])), CONTENT),
        (chunk(delta(finish="stop")), CONTENT),
        (chunk({"index": 0, "text": "a"}), CONTENT),
        (chunk({"text": "", "finish_reason": "length"}), CONTENT),
        (chunk(delta(), delta(1, content="a")), CONTENT),
        (chunk(delta(content="a"), usage={"completion_tokens": 1}), CONTENT),
        (chunk(usage={"completion_tokens": 1}), USAGE),
        (b"data: [DONE]\n\n", DONE),
        (b"data:[DONE]\r\n\r\n", DONE),
        (b"data: [DONE] \n\n", DONE),
        (encode_event(b"{"), MALFORMED),
        (encode_event(b"[]"), MALFORMED),
        (encode_event(b""), MALFORMED),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_an_event_means(event: bytes, kind: EventKind) -> None:
    assert StreamReader().read(event) is kind


def reader(*events: bytes) -> StreamReader:
    made = StreamReader()
    for event in events:
        made.read(event)
    return made


@pytest.mark.parametrize(
    ("events", "whole"),
    [
        ([], False),
        ([b"data: [DONE]\n\n"], False),
        ([chunk(delta(content="a"))], False),
        ([chunk(delta(content="a")), b"data: [DONE]\n\n"], False),
        ([chunk(delta(content="a")), chunk(delta(finish="stop"))], True),
        ([chunk(delta(1, content="a")), chunk(delta(finish="stop"))], False),
        ([chunk(delta(1, "stop")), chunk(delta(content="a")), chunk(delta(0, "stop"))], True),
        ([chunk(delta(0, "stop"), delta(1, "length"))], True),
    ],
    ids=["empty", "only DONE", "no end", "DONE", "end", "one of two", "both", "at once"],
)
def test_a_stream_is_whole_when_every_choice_has_ended(events: list[bytes], whole: bool) -> None:
    assert reader(*events).is_whole is whole


def test_usage_is_the_engines_count_or_an_event_for_a_token() -> None:
    text = [chunk(delta(role="assistant")), chunk(delta(content="a")), chunk(delta(content="b"))]

    assert reader(*text).final_usage() == Usage(0, 2)
    assert reader(*text, chunk(delta(finish="stop"))).final_usage() == Usage(0, 2)
    counted = chunk(usage={"prompt_tokens": 7, "completion_tokens": 9})
    assert reader(*text, counted).final_usage() == Usage(7, 9)


def test_usage_that_is_no_usage_is_estimated() -> None:
    assert reader(chunk(delta(content="a"), usage="many")).final_usage() == Usage(0, 1)


@pytest.mark.parametrize("body", [{"error": {"message": "boom"}}, {"error": "boom"}], ids=repr)
def test_an_error_event_is_raised(body: object) -> None:
    with pytest.raises(EngineError, match="boom"):
        StreamReader().read(encode_event(orjson.dumps(body)))


def test_five_malformed_events_in_a_row_are_borne_and_six_are_not() -> None:
    bad = encode_event(b"{")
    made = reader(*[bad] * 5, chunk(delta(content="a")), *[bad] * 5)
    assert made.malformed == 10

    with pytest.raises(NotAnAnswer, match="6 malformed events"):
        made.read(bad)


@steady
@given(st.lists(ANY_JSON.map(lambda v: json.dumps({"choices": [v], "usage": v}).encode())))
def test_no_event_makes_the_reader_fail_otherwise(bodies: list[bytes]) -> None:
    made = StreamReader()
    try:
        for body in bodies:
            made.read(encode_event(body))
    except (EngineError, NotAnAnswer):
        pass
    made.final_usage()


@pytest.mark.parametrize(
    ("expected", "chunks", "done", "whole"),
    [
        (1, [("a", None), ("", "")], False, False),  # "" is no reason
        (1, [("a", None), ("", "stop")], False, True),
        (1, [("a", "stop"), ("b", None)], False, False),  # it went on
        (1, [("a", "stop"), ("b", None), ("", "stop")], False, True),
        (2, [("a", "stop")], False, False),  # the second never began
        (2, [("a", "stop")], True, True),  # unless the engine knows of no second
    ],
)
def test_a_stream_is_whole_when_all_that_was_asked_for_has_ended(
    expected: int, chunks: list[tuple[str, str | None]], done: bool, whole: bool
) -> None:
    reader = StreamReader(expected=expected)
    for text, reason in chunks:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        reader.read(b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n")
    if done:
        reader.read(b"data: [DONE]\n\n")

    assert reader.is_whole is whole
