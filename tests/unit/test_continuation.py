"""Joining two streams: what is asked of the second engine, and what the client makes of both."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.wire.continuation import (
    Continuation,
    Prefill,
    Way,
    may_be_continued,
    replay,
    resume,
)
from citadel_gateway.wire.delivered import Delivered
from citadel_gateway.wire.openai_answer import Usage
from citadel_gateway.wire.openai_request import InferenceRequest, Kind, parse_request
from citadel_gateway.wire.openai_stream import EventKind, StreamReader
from citadel_gateway.wire.seam import Diverged, Seam
from citadel_gateway.wire.sse import EventSplitter, event_data
from tests.support.canonical_engine import SHAPES, Canonical, Chunk, encode

steady = settings(deadline=None, derandomize=True, max_examples=150)
HI = [{"role": "user", "content": "hi"}]
WORDS = (
    "Once",
    " upon",
    " a",
    " time",
    "\n",
    "\n",
    "  the",
    " sea",
    "é",
    " «ß»",
    "海",
    ' "q"',
    "🐈",
    ".",
)


def chat(**fields: Any) -> InferenceRequest:
    return request(Kind.CHAT, messages=HI, **fields)


def request(kind: Kind, **fields: Any) -> InferenceRequest:
    return parse_request(kind, orjson.dumps({"model": "m", "stream": True, **fields}))


def deliver(data: bytes, delivered: Delivered, seam: Seam | None, cuts: random.Random) -> bytes:
    """What the client gets of *data*, which arrives in pieces of any size."""
    reader, splitter, sent = StreamReader(delivered=delivered), EventSplitter(), b""
    while data:
        size = cuts.choice([1, 2, 3, 50, 300, len(data)])
        piece, data = data[:size], data[size:]
        for event in splitter.feed(piece):
            if seam is None and reader.knows(event):
                sent += event
                continue
            kind = reader.read(event)
            assert kind is not EventKind.MALFORMED
            if seam is not None and reader.chunk is not None:
                event = seam.join(reader.chunk)
            if event:
                sent += event
                if reader.chunk is not None:
                    delivered.note(reader.chunk)
    return sent


def chunks_of(data: bytes) -> list[Any]:
    return [orjson.loads(event_data(event) or b"") for event in EventSplitter().feed(data)]


def text_of(chunks: list[Any], *names: str) -> str:
    said = ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            parts = [choice, choice.get("delta") or {}]
            said += "".join(p.get(n) or "" for p in parts for n in names or ("content", "text"))
    return said


def told(text: str = "", *chunks: Chunk, most: int = 10_000) -> Delivered:
    delivered = Delivered(most)
    for chunk in chunks or Canonical((text,), "llamacpp").chunks("one")[: 1 + bool(text)]:
        delivered.note(chunk)
    return delivered


def delta(**fields: Any) -> Chunk:
    return {"id": "x", "choices": [{"index": 0, "delta": fields}]}


# --- two streams make one --------------------------------------------------------------------


@steady
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    tokens=st.lists(st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), min_size=1),
                    min_size=1, max_size=12),
    way=st.sampled_from(Way),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_the_joined_text_is_that_of_the_unbroken_stream(
    shape: str, tokens: list[str], way: Way, seed: int
) -> None:
    cuts, engine = random.Random(seed), Canonical(tuple(tokens), shape)
    first = [encode(chunk) for chunk in engine.chunks("one")]
    ended = len(first) - 2  # the event with the finish_reason: behind it, all has been said
    delivered = Delivered(10_000)
    sent = deliver(b"".join(first[: cuts.randint(0, ended)]), delivered, None, cuts)
    asked = request(Kind.COMPLETIONS, prompt="Once", temperature=0)
    if shape != "completions":
        asked = chat(temperature=0)

    found = replay(asked, delivered)
    if way is Way.RESUME:
        found = resume(asked, delivered, Prefill.FLAGGED)
        if delivered.text.decode().rstrip(" \t\r\n").endswith("\ufffd"):
            assert found is None
            return
    assert found is not None
    told_before = "".join(tokens)[: len(delivered.text.decode())].rstrip(" \t\r\n")
    second = engine.chunks("two", told_before if found.way is Way.RESUME else "")
    sent += deliver(b"".join(map(encode, second)), delivered, found.make_seam(), cuts)

    *said, usage = chunks_of(sent)
    assert text_of(said) == engine.text == delivered.text.decode()
    assert len({chunk["id"] for chunk in said}) == 1
    assert len({chunk["model"] for chunk in said}) == 1
    reasons = [choice["finish_reason"] for chunk in said for choice in chunk["choices"]]
    assert reasons == [None] * (len(said) - 1) + ["stop"]
    if shape != "completions" and shape != "ollama":
        assert sum(bool(chunk["choices"][0]["delta"].get("role")) for chunk in said) == 1
    assert usage["id"] == said[0]["id"]


def test_the_second_stream_takes_the_identity_of_the_first() -> None:
    first = {"id": "1", "created": 5, "model": "m", "choices": []}
    seam = Seam(told("a", first, delta(content="a")), "", "", is_replay=False)
    second = {**delta(content="b"), "id": "2", "created": 9, "system_fingerprint": "fp"}

    [joined] = chunks_of(seam.join(second))

    choices = [{"index": 0, "delta": {"content": "b"}}]
    assert joined == {"id": "1", "choices": choices, "created": 5, "model": "m"}


def test_a_second_role_is_not_told_and_a_first_one_is() -> None:
    role = delta(role="assistant", content="")
    seam = Seam(told("a", role, delta(content="a")), "", "", is_replay=False)
    assert seam.join(delta(role="assistant", content="")) == b""
    [joined] = chunks_of(seam.join(delta(role="assistant", content="b")))
    assert joined["choices"][0]["delta"] == {"content": "b"}

    never_told = Seam(told("a", delta(content="a")), "", "", is_replay=False)
    [joined] = chunks_of(never_told.join(delta(role="assistant", content="b")))
    assert joined["choices"][0]["delta"] == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("space", "says", "told_then"),
    [
        (" ", [" the", " sea"], "the sea"),
        (" ", ["the", " sea"], "the sea"),
        ("\n", ["\n", "\n", "the"], "\nthe"),
        ("\n\n", ["\n", "\n", "the"], "the"),
        ("\n\n", ["\n\nthe"], "the"),
        ("\n\n", [" the"], "the"),
        ("\n\n", ["\n- the"], "- the"),
        ("\n    ", ["\n", "    return"], "return"),
        ("\n   ", ["\n", "    return"], " return"),
        ("", [" the"], " the"),
        ("", ["the"], "the"),
    ],
)
def test_white_space_at_the_join_is_there_once(space: str, says: list[str], told_then: str) -> None:
    delivered = told("word" + space)
    found = resume(chat(), delivered, Prefill.FLAGGED)
    assert found is not None
    seam = found.make_seam()

    joined = b"".join(seam.join(delta(content=word)) for word in says)

    assert orjson.loads(found.request.body)["messages"][-1]["content"] == "word"
    assert text_of(chunks_of(joined)) == told_then


def test_what_was_said_without_parsing_is_remembered_too() -> None:
    delivered = Delivered(10_000)
    words = [f"w{i} " for i in range(50)]
    events = [encode(chunk) for chunk in Canonical(tuple(words), "llamacpp").chunks("one")]
    reader, known = StreamReader(delivered=delivered), 0
    for event in events[:-2]:
        if reader.knows(event):
            known += 1
        else:
            reader.read(event)
            delivered.note(reader.chunk or {})

    assert known > 40
    assert delivered.text.decode() == "".join(words)
    assert delivered.tokens == 50


def test_reasoning_and_answer_are_kept_apart_however_they_are_recognised() -> None:
    delivered = Delivered(10_000)
    thoughts, words = [f"t{i} " for i in range(9)], [f"w{i} " for i in range(9)]
    chunks = [delta(reasoning_content=thought) for thought in thoughts]
    chunks += [delta(content=word) for word in words]
    deliver(b"".join(map(encode, chunks)), delivered, None, random.Random(0))

    assert delivered.thought.decode() == "".join(thoughts)
    assert delivered.text.decode() == "".join(words)


def test_a_text_that_stands_in_the_event_twice_is_not_mistaken() -> None:
    def chunk(word: str, other: str) -> bytes:
        return encode({"meta": {"text": other}, **delta(content=word)})

    delivered = Delivered(10_000)
    events = [chunk("a", "a"), chunk("b", "a"), chunk("b", "b"), chunk("c", "x"), chunk("c", "y")]
    deliver(b"".join(events), delivered, None, random.Random(3))

    assert delivered.text == b"abbcc"


# --- replays ---------------------------------------------------------------------------------


def say(word: str) -> Chunk:
    return delta(content=word)


def replayed(delivered: Delivered) -> Seam:
    found = replay(chat(temperature=0), delivered)
    assert found is not None
    return found.make_seam()


@pytest.mark.parametrize("says", [["a"], ["x"], ["ab", "x"], ["abcx"], ["", "abd"]])
def test_a_replay_that_says_something_else_is_of_no_use(says: list[str]) -> None:
    seam = replayed(told("abc, and more"))

    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

    with pytest.raises(Diverged):
        deliver(b"".join(map(encode, [*map(say, says), end])), told(), seam, random.Random(0))


def test_a_replay_must_think_the_same_before_it_says_the_same() -> None:
    delivered = told("", delta(reasoning_content="hmm"), delta(content="a"))
    seam = replayed(delivered)
    assert seam.join(delta(reasoning_content="hm")) == b""
    with pytest.raises(Diverged):
        seam.join(delta(content="a"))

    seam = replayed(delivered)
    with pytest.raises(Diverged):
        seam.join(delta(reasoning_content="no"))

    seam = replayed(delivered)
    assert seam.join(delta(reasoning_content="hmm")) == b""
    assert text_of(chunks_of(seam.join(delta(content="ab")))) == "b"


def test_a_replay_that_calls_a_tool_instead_has_diverged() -> None:
    with pytest.raises(Diverged):
        replayed(told("abc")).join(delta(tool_calls=[{"index": 0}]))


# --- usage -----------------------------------------------------------------------------------


def usage_of(seam: Seam, prompt: int, completion: int) -> Usage:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}
    [joined] = chunks_of(seam.join({"choices": [], "usage": usage}))
    total = joined["usage"].pop("total_tokens")
    assert total == joined["usage"]["prompt_tokens"] + joined["usage"]["completion_tokens"]
    return Usage(**joined["usage"])


def test_usage_is_the_clients_prompt_once_and_all_that_was_delivered() -> None:
    delivered = told("", *[delta(content="a")] * 40)

    resumed = Seam(delivered, "", "", is_replay=False)
    assert usage_of(resumed, 11 + 40, 20) == Usage(11, 60)
    assert usage_of(resumed, 11, 20) == Usage(11, 60)  # an engine that does not count what it got
    assert usage_of(replayed(delivered), 11, 60) == Usage(11, 60)


def test_white_space_that_is_said_twice_is_counted_once() -> None:
    delivered = told("", delta(content="a"), delta(content="\n\n"))
    seam = Seam(delivered, "\n\n", "", is_replay=False)
    assert seam.join(delta(content="\n\n")) == b""
    assert seam.join(delta(content="b"))

    assert usage_of(seam, 11 + 1, 2) == Usage(11, 3)


def test_white_space_that_ends_it_is_no_part_of_the_prompt_of_who_may_say_no_more() -> None:
    delivered = told("", delta(content="a"), delta(content="\n\n"))
    resumed = resume(chat(max_tokens=2), delivered, Prefill.FLAGGED)
    assert resumed is not None
    repeats, says_another = resumed.make_seam(), resumed.make_seam()
    assert repeats.join(delta(content="\n\n")) == b""
    assert says_another.join(delta(content="b")) == b""

    assert usage_of(repeats, 11 + 1, 1) == Usage(11, 2)
    assert usage_of(says_another, 11 + 2, 1) == Usage(11, 2)


def test_a_repeated_token_is_not_passed_on_for_the_sake_of_its_count() -> None:
    seam = Seam(told("", delta(content="a"), delta(content="\n")), "\n", "", is_replay=False)
    usage = {"prompt_tokens": 12, "completion_tokens": 1}

    assert seam.join({**delta(content="\n"), "usage": usage}) == b""


def test_who_was_told_nothing_of_it_begins_anew() -> None:
    asked = chat(max_tokens=2)
    resumed = resume(asked, told("\n\n"), Prefill.NONE)
    assert resumed is not None
    assert orjson.loads(resumed.request.body) == orjson.loads(asked.body)
    seam = resumed.make_seam()
    assert seam.join(delta(content="\n\n")) == b""
    assert seam.join(delta(content="a"))

    assert usage_of(seam, 11, 2) == Usage(11, 2)
    seam = resumed.make_seam()
    [chunk] = chunks_of(seam.join(delta(content="\n\na")))
    assert chunk["choices"][0]["delta"] == {"content": "a"}

    assert usage_of(seam, 11, 2) == Usage(11, 2)  # two tokens in one event


def test_a_token_with_old_and_new_text_in_it_is_told_to_a_third_engine_once() -> None:
    delivered = told("", delta(content="a"))
    seam = replayed(delivered)
    for text in ("a\n\n", "b ", "c"):
        [chunk] = chunks_of(seam.join(delta(content=text)))
        delivered.note(chunk)
        seam.count(delivered)

    assert (bytes(delivered.text), delivered.tokens) == (b"a\n\nb c", 3)
    third = resume(chat(), delivered, Prefill.FLAGGED)
    assert third is not None
    assert usage_of(third.make_seam(), 11 + 3, 1) == Usage(11, 4)


def test_who_says_it_anew_and_tells_how_much_it_was_is_believed() -> None:
    delivered = told("", delta(content="\n"), delta(content="\n"))
    anew = resume(chat(), delivered, Prefill.NONE)
    assert anew is not None
    seam = anew.make_seam()
    usage = {"prompt_tokens": 11, "completion_tokens": 5}
    [chunk] = chunks_of(seam.join({**delta(content="\n\na b c"), "usage": usage}))
    delivered.note(chunk)
    seam.count(delivered)

    assert delivered.tokens == 5


def test_whose_message_it_is_is_said_once() -> None:
    seam = Seam(told("", delta(content="a")), "", "", is_replay=False)

    assert seam.join(delta(role="assistant"))
    assert not seam.join(delta(role="assistant"))


def test_usage_that_the_first_engine_told_is_believed() -> None:
    running = {**delta(content="a"), "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
    delivered = told("", running)

    assert delivered.tokens == 3  # in one event
    assert usage_of(Seam(delivered, "", "", is_replay=False), 14, 5) == Usage(9, 8)


# --- what the second engine is asked ---------------------------------------------------------


def resumed(asked: InferenceRequest, delivered: Delivered, prefill: Prefill) -> Any:
    found = resume(asked, delivered, prefill)
    return None if found is None else orjson.loads(found.request.body)


def test_a_chat_is_given_the_beginning_of_the_answer() -> None:
    last = {"role": "assistant", "content": 'Once "upon"'}
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    plain = orjson.loads(chat().body)

    body = resumed(chat(), told('Once "upon"'), Prefill.FLAGGED)
    assert body == {**plain, "messages": [*HI, last], **flags}
    body = resumed(chat(), told('Once "upon"'), Prefill.LAST_MESSAGE)
    assert body == {**plain, "messages": [*HI, last]}
    assert resumed(chat(), told("Once"), Prefill.NONE) is None


def test_the_clients_own_words_stay_as_they_were_written() -> None:
    written = b'{"x":1e2, "messages" : [ {"role":"user","content":"\\u00e9 1.0"} ] ,"stream":true}'
    found = resume(parse_request(Kind.CHAT, written), told("a"), Prefill.LAST_MESSAGE)

    assert found is not None
    added = b',{"role":"assistant","content":"a"}]'
    assert found.request.body == written.replace(b"]", added)


@pytest.mark.parametrize("prefill", Prefill)
def test_a_completion_is_given_a_longer_prompt(prefill: Prefill) -> None:
    asked = request(Kind.COMPLETIONS, prompt="The sea ")
    assert resumed(asked, told("was "), prefill)["prompt"] == "The sea was"
    asked = request(Kind.COMPLETIONS, prompt=["The sea "])
    assert resumed(asked, told("was"), prefill)["prompt"] == ["The sea was"]
    assert resumed(request(Kind.COMPLETIONS, prompt=[1, 2, 3]), told("was"), prefill) is None


def test_nothing_said_yet_means_the_request_as_it_is() -> None:
    for text in ("", "\n\n"):
        assert resumed(chat(), told(text), Prefill.NONE) == orjson.loads(chat().body)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_what_was_delivered_is_taken_from_the_limits(name: str) -> None:
    delivered = told("", *[delta(content="a")] * 40)

    body = resumed(chat(**{name: 60, "min_tokens": 50}), delivered, Prefill.FLAGGED)
    assert (body[name], body["min_tokens"]) == (20, 10)
    assert name not in resumed(chat(), delivered, Prefill.FLAGGED)


def test_of_an_answer_that_lacks_only_its_end_no_more_text_is_delivered() -> None:
    delivered = told("", *[delta(content="a")] * 40)
    found = resume(chat(max_tokens=40), delivered, Prefill.FLAGGED)
    assert found is not None
    assert orjson.loads(found.request.body)["max_tokens"] == 1
    seam = found.make_seam()

    assert seam.join(delta(content="more")) == b""
    end = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "length"}]}
    assert chunks_of(seam.join(end))[0]["choices"][0]["finish_reason"] == "length"
    assert usage_of(seam, 51, 1) == Usage(11, 40)


# --- where it would be a lie -----------------------------------------------------------------


def ways(asked: InferenceRequest, delivered: Delivered) -> set[Way]:
    found: list[Continuation | None] = [
        resume(asked, delivered, Prefill.FLAGGED),
        replay(asked, delivered),
    ]
    return {continuation.way for continuation in found if continuation is not None}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"guided_regex": "a+"},
        {"structured_outputs": {"regex": "a+"}},
        {"grammar": "root ::= [a]"},
        {"tools": [{}], "tool_choice": "required"},
        {"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"messages": [*HI, {"role": "assistant", "content": "I"}]},
        {"stop": ["xyz", "word\n"]},
        {"stop": "ord."},
    ],
    ids=str,
)  # fmt: skip
def test_what_an_engine_would_begin_anew_is_only_replayed(fields: dict[str, Any]) -> None:
    asked = {"messages": HI, **fields}

    assert ways(request(Kind.CHAT, **asked, temperature=0), told("A word")) == {Way.REPLAY}
    assert ways(request(Kind.CHAT, **asked), told("A word")) == set()


def test_a_deterministic_request_may_be_replayed_and_no_other() -> None:
    assert ways(chat(temperature=0), told("a")) == {Way.RESUME, Way.REPLAY}
    assert ways(chat(temperature=0.0), told("a")) == {Way.RESUME, Way.REPLAY}
    for fields in ({}, {"temperature": None}, {"temperature": 0.1}, {"seed": 1}):
        assert ways(chat(**fields), told("a")) == {Way.RESUME}


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["xyz", "sea", "\n\n"]},
        {"tools": [{}]},
        {"tools": [{}], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"response_format": None, "stop": None, "logprobs": False},
    ],
    ids=str,
)
def test_what_an_engine_goes_on_with_is_resumed(fields: dict[str, Any]) -> None:
    assert ways(chat(**fields), told("A word\n")) == {Way.RESUME}


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"echo": True}], ids=str)
def test_what_cannot_be_told_apart_is_not_continued(fields: dict[str, Any]) -> None:
    assert ways(chat(temperature=0, **fields), told("a")) == set()


@pytest.mark.parametrize(
    "chunk",
    [
        delta(tool_calls=[{"index": 0}]),
        delta(refusal="no"),
        delta(content="b", audio={"id": "x"}),
        delta(content=["b"]),
        delta(reasoning="b", reasoning_content="b"),
        {"choices": [{"index": 1, "delta": {"content": "b"}}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "logprobs": {"content": []}}]},
    ],
    ids=str,
)
def test_more_than_text_is_not_continued(chunk: Chunk) -> None:
    assert ways(chat(temperature=0), told("", delta(content="a"), chunk)) == set()


def test_reasoning_is_only_replayed() -> None:
    delivered = told("", delta(reasoning_content="hm"))

    assert ways(chat(), delivered) == set()
    assert ways(chat(temperature=0), delivered) == {Way.REPLAY}


def test_half_a_character_is_only_replayed() -> None:
    assert ways(chat(temperature=0), told("a\ufffd")) == {Way.REPLAY}


def test_more_than_is_remembered_is_not_continued_and_not_kept() -> None:
    for field in ("content", "reasoning_content"):
        delivered = Delivered(100)
        reader = StreamReader(delivered=delivered)
        for event in [encode(delta(**{field: "0123456789"}))] * 20:
            if not reader.knows(event):
                reader.read(event)
                delivered.note(reader.chunk or {})

        assert len(delivered.text) + len(delivered.thought) <= 110
        assert ways(chat(temperature=0), delivered) == set()


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"n": 1}, True),
        ({"n": 2}, False),
        ({"stream": False}, False),
        ({"store": True}, False),
    ],
    ids=str,
)
def test_which_streams_are_remembered(fields: dict[str, Any], may: bool) -> None:
    assert may_be_continued(chat(**fields)) is may
