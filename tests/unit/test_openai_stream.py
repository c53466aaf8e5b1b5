"""What the events of a stream mean, and when a stream is whole."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.openai_answer import EngineError, NotAnAnswer, Usage
from citadel_gateway.wire.openai_stream import EventKind, StreamReader
from citadel_gateway.wire.sse import encode_event
from tests.support.json_values import ANY_JSON

steady = settings(deadline=None, derandomize=True)

QUIET, CONTENT, USAGE = EventKind.QUIET, EventKind.CONTENT, EventKind.USAGE
DONE, MALFORMED = EventKind.DONE, EventKind.MALFORMED


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


# Events that are alike.

SAID = '{"id":"1","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}'


def said(text: str) -> bytes:
    return encode_event((SAID % text).encode())


@pytest.mark.parametrize(
    "event",
    [
        said("b"),
        said("a much longer text, with {braces}: [and] all"),
        said("日本語"),
        said(" "),
    ],
    ids=["other", "longer", "wide", "space"],
)
def test_an_event_like_the_last_is_known(event: bytes) -> None:
    made = reader(said("a"))

    assert made.knows(event)
    assert made.content_events == 2


@pytest.mark.parametrize(
    "event",
    [
        said(""),
        said("\\n"),
        said('\\"'),
        said('x"},"finish_reason":"stop'),
        said("a\tb"),
        said("a").replace(b"a", b"\xff"),
        said("a").replace(b"null", b'"stop"'),
        said("a").replace(b'"id":"1"', b'"id":"2"'),
        said("a").replace(b'"index":0', b'"index":1'),
        said("a").replace(b'"delta"', b'"error"'),
        said("a")[:-1],
        said("a") + said("b"),
        b": ping\n\n",
        b"data: [DONE]\n\n",
        b"",
    ],
)
def test_an_event_that_differs_in_more_must_be_read(event: bytes) -> None:
    made = reader(said("a"))

    assert not made.knows(event)
    assert made.content_events == 1


@pytest.mark.parametrize(
    "last",
    [
        chunk(delta(content="a", finish="stop")),
        chunk(delta(content="a"), delta(1, content="a")),
        chunk(delta(content="a"), usage={"completion_tokens": 1}),
        chunk(delta(role="assistant")),
        encode_event(b"{"),
    ],
    ids=["an end", "two choices", "usage", "a role", "malformed"],
)
def test_nothing_is_known_after_an_event_that_did_more_than_add_text(last: bytes) -> None:
    made = reader(said("a"), last)

    assert not made.knows(last)
    assert not made.knows(said("a"))


def test_a_stream_whose_events_are_never_alike_is_not_compared_for_ever() -> None:
    made = StreamReader()
    for number in range(20):
        made.read(said("a").replace(b'"1"', b'"%d"' % number))

    assert not made.knows(said("a").replace(b'"1"', b'"19"'))


@steady
@given(st.lists(st.text(max_size=6), min_size=1, max_size=8))
def test_knowing_and_reading_come_to_the_same(texts: list[str]) -> None:
    events = [encode_event((SAID % orjson.dumps(t).decode()[1:-1]).encode()) for t in texts]
    quick, careful = StreamReader(), StreamReader()
    for event in events:
        if not quick.knows(event):
            quick.read(event)
        careful.read(event)

    assert (quick.content_events, quick.is_whole) == (careful.content_events, careful.is_whole)
