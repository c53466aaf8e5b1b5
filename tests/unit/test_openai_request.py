"""Requests of clients: checked strictly, and passed on byte for byte but for what must change."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from citadel_gateway.errors import GatewayError
from citadel_gateway.wire.json_object import parse_object, set_members
from citadel_gateway.wire.openai_request import InferenceRequest, Kind, parse_request

steady = settings(deadline=None, derandomize=True)

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, EMBEDDINGS = Kind.CHAT, Kind.COMPLETIONS, Kind.EMBEDDINGS


def chat(**fields: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": MESSAGES, **fields})


def parse(body: bytes | str, kind: Kind = CHAT) -> InferenceRequest:
    return parse_request(kind, body.encode() if isinstance(body, str) else body)


def refusal(body: bytes | str, kind: Kind = CHAT) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        parse(body, kind)
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")
    caught.value.body()
    return caught.value


def test_what_the_gateway_relies_on_is_read() -> None:
    request = parse(chat(stream=True, stream_options={"include_usage": True}, max_tokens=7))

    assert (request.model, request.stream, request.wants_usage) == ("m", True, True)
    assert (request.stateless, request.max_tokens) == (True, 7)
    assert request.prompt_tokens == len(request.body) // 4


@pytest.mark.parametrize("model", ['"auto"', '""', "null"])
def test_a_model_may_be_left_to_the_gateway(model: str) -> None:
    assert parse('{"model":' + model + ',"messages":[{"role":"user"}]}').model is None
    assert parse('{"messages":[{"role":"user"}]}').model is None


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CHAT, '{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}]}'),
        (CHAT, '{"messages":[{"role":"assistant","content":null}]}'),
        (CHAT, ' \n{ "messages" : [ {"role":"user"} ] , "x" : {} } \t\r\n'),
        (COMPLETIONS, '{"prompt":""}'),
        (COMPLETIONS, '{"prompt":["a","b"]}'),
        (COMPLETIONS, '{"prompt":[1,2,3]}'),
        (EMBEDDINGS, '{"input":"a","stream":true}'),
        (EMBEDDINGS, '{"input":[[1],[2]]}'),
    ],
)
def test_proper_requests_of_every_kind_are_taken(kind: Kind, body: str) -> None:
    request = parse(body, kind)

    assert request.body == body.encode()
    assert not request.stream


@pytest.mark.parametrize("field", ["store", "previous_response_id", "background", "conversation"])
def test_a_request_that_leaves_something_behind_is_not_stateless(field: str) -> None:
    assert not parse(chat(**{field: "x"})).stateless
    assert parse(chat(**{field: None})).stateless


BROKEN = {
    "empty": b"",
    "blank": b" ",
    "open": b"{",
    "garbage behind": chat() + b"x",
    "two": chat() * 2,
    "array": b"[]",
    "string": b'"x"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
    "deep array": b"[" * 100_000,
    "deep": b'{"messages":[{"role":"u"}],"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "65 deep": b'{"messages":[{"role":"u"}],"x":' + b"[" * 64 + b"]" * 64 + b"}",
    "65 deep objects": b'{"messages":[{"role":"u"}],"x":' + b'{"a":' * 64 + b"1" + b"}" * 65,
    "digits": b'{"messages":[{"role":"u"}],"x":' + b"1" * 5000 + b"}",
    "1e400": b'{"messages":[{"role":"u"}],"x":1e400}',
    "NaN": b'{"messages":[{"role":"u"}],"x":NaN}',
    "Infinity": b'{"messages":[{"role":"u"}],"x":-Infinity}',
    "lone surrogate": rb'{"messages":[{"role":"u","content":"\ud800"}]}',
    "surrogates in UTF-8": b'{"messages":[{"role":"u","content":"\xed\xa0\x80"}]}',
    "not UTF-8": b'{"messages":[{"role":"u","content":"\xff"}]}',
    "byte order mark": b"\xef\xbb\xbf" + chat(),
    "UTF-16": chat().decode().encode("utf-16"),
    "UTF-32": chat().decode().encode("utf-32-le"),
    "comment": b"/**/" + chat(),
    "trailing comma": b'{"messages":[{"role":"u"}],}',
    "single quotes": b"{'messages':[]}",
    "too many fields": orjson.dumps({str(i): i for i in range(1001)}),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_not_a_sound_json_object_is_refused(body: bytes) -> None:
    refusal(body)


def test_sixty_four_levels_are_fine_and_brackets_in_text_are_no_levels() -> None:
    deep = b'{"messages":[{"role":"u"}],"x":' + b"[" * 63 + b"]" * 63 + b"}"

    assert parse(deep).body == deep
    assert parse(chat(user="[{" * 1000)).prompt_tokens > 500


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"a","model":"b","messages":[]}', "model"),
        (b'{"stream":true,"messages":[],"stream":false}', "stream"),
        (b'{"max_tokens":1,"max_tokens":1,"messages":[]}', "max_tokens"),
        (rb'{"model":"a","\u006dodel":"b","messages":[]}', "model"),
        (rb'{"\u006d\u006f\u0064\u0065\u006C":"a","model":"b","messages":[]}', "model"),
        (b'{"temperature":1,"messages":[],"temperature":2}', "temperature"),
        (b'{"store":false,"messages":[],"store":true}', "store"),
        (b'{"":1,"":2,"messages":[]}', ""),
        (b'{"a":{},"a":[],"messages":[]}', "a"),
    ],
    ids=repr,
)
def test_a_field_given_twice_is_refused_however_it_is_spelled(body: bytes, param: str) -> None:
    error = refusal(body)

    assert (error.code, error.param) == ("duplicate_key", param)


def test_a_name_twice_in_two_spellings_beyond_ascii_is_refused_too() -> None:
    assert refusal('{"é":1,"\\u00e9":2,"messages":[]}').code == "duplicate_key"
    assert refusal('{"中":1,"\\u4e2d":2,"messages":[]}').code == "duplicate_key"


def test_the_same_name_at_different_levels_is_no_duplicate() -> None:
    body = rb'{"model":"a","messages":[{"role":"u","model":"b"}],"x":{"\u006dodel":1,"model":2}}'

    assert parse(body).model == "a"


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CHAT, "{}", "messages"),
        (CHAT, '{"messages":null}', "messages"),
        (CHAT, '{"messages":"hi"}', "messages"),
        (CHAT, '{"messages":{}}', "messages"),
        (CHAT, '{"messages":[]}', "messages"),
        (CHAT, '{"messages":["hi"]}', "messages[0]"),
        (CHAT, '{"messages":[{"role":"u"},null]}', "messages[1]"),
        (CHAT, '{"messages":[{}]}', "messages[0].role"),
        (CHAT, '{"messages":[{"role":1}]}', "messages[0].role"),
        (CHAT, '{"messages":[{"role":"u","content":7}]}', "messages[0].content"),
        (CHAT, '{"messages":[{"role":"u","content":{}}]}', "messages[0].content"),
        (COMPLETIONS, "{}", "prompt"),
        (COMPLETIONS, '{"prompt":1}', "prompt"),
        (COMPLETIONS, '{"prompt":[]}', "prompt"),
        (COMPLETIONS, '{"prompt":true}', "prompt"),
        (EMBEDDINGS, "{}", "input"),
        (EMBEDDINGS, '{"input":{}}', "input"),
        (EMBEDDINGS, '{"input":"a","stream_options":{"include_usage":true}}', "stream_options"),
    ],
)
def test_what_is_asked_must_be_there(kind: Kind, body: str, param: str) -> None:
    assert refusal(body, kind).param == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1), ("model", {}), ("model", "x" * 257),
        ("stream", "true"), ("stream", 1), ("stream", []),
        ("stream_options", True), ("stream_options", []),
        ("n", 0), ("n", -1), ("n", 1_000_000), ("n", True), ("n", 1.0), ("n", "1"),
        ("best_of", 1000),
        ("max_tokens", -1), ("max_tokens", 2**63), ("max_tokens", 1.5), ("max_tokens", "9"),
        ("max_completion_tokens", -1), ("max_completion_tokens", []),
        ("temperature", "hot"), ("temperature", True), ("top_p", []), ("presence_penalty", {}),
        ("frequency_penalty", "x"), ("seed", "x"), ("seed", 2**64), ("stop", 1), ("stop", {}),
        ("tools", {}), ("logit_bias", []), ("response_format", "json"), ("user", 1),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_documented_field_of_the_wrong_type_is_refused(field: str, value: object) -> None:
    error = refusal(json.dumps({"messages": MESSAGES, field: value}))

    assert (error.param, error.code) == (field, "invalid_type")


def test_stream_options_need_a_stream() -> None:
    assert refusal(chat(stream_options={"include_usage": True})).param == "stream_options"
    assert not parse(chat(stream_options=None)).wants_usage


def test_null_is_as_good_as_absent() -> None:
    names = ["model", "stream", "n", "max_tokens", "temperature", "stop", "tools", "user"]

    assert parse(chat(**dict.fromkeys(names))).max_tokens is None


@pytest.mark.parametrize("name", ["base_url", "api_base", "api_key", "extra_headers", "new_field"])
def test_fields_the_gateway_does_not_know_pass_untouched(name: str) -> None:
    body = chat(**{name: {"a": [1, None]}})

    assert parse(body).body_for("m", ask_usage=True) == body


def test_too_much_is_refused_and_quickly() -> None:
    many = orjson.dumps({"messages": MESSAGES * 90_000})
    tokens = orjson.dumps({"prompt": list(range(1_000_000))})
    keys = b"{" + b",".join(b'"%d":1' % i for i in range(400_000)) + b"}"
    same = b"{" + b",".join([b'"a":1'] * 1_000_000) + b"}"

    began = time.perf_counter()
    assert refusal(many).param == "messages"
    assert refusal(b'{"x":[%s[]]}' % (b"[]," * 2_000_000)).code == "too_long"
    assert refusal(tokens, COMPLETIONS).param == "prompt"
    refusal(keys)
    assert refusal(same).code == "duplicate_key"
    assert time.perf_counter() - began < 5.0


def changed(body: bytes | str, model: str = "new", *, ask_usage: bool = True) -> bytes:
    return parse(body).body_for(model, ask_usage=ask_usage)


def test_the_body_is_the_same_object_when_nothing_changes() -> None:
    request = parse(chat(stream=True, stream_options={"include_usage": True}))

    assert request.body_for("m", ask_usage=True) is request.body
    assert parse(chat()).body_for("m", ask_usage=True) == chat()


M = b'"messages":[{"role":"u"}]'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"m",%s}' % M, b'{"model":"new",%s}' % M),
        (b'{ %s , "model" :\t"m" }\n' % M, b'{ %s , "model" :\t"new" }\n' % M),
        (b"{%s}" % M, b'{"model":"new",%s}' % M),
        (b' { "x":1.50e0,%s}' % M, b' {"model":"new", "x":1.50e0,%s}' % M),
        (b'{"model":null,%s}' % M, b'{"model":"new",%s}' % M),
        (b'{"model":"",%s}' % M, b'{"model":"new",%s}' % M),
        (rb'{"model":"\u006d\/",%s}' % M, b'{"model":"new",%s}' % M),
        (rb'{"\u006dodel":"m",%s}' % M, rb'{"\u006dodel":"new",%s}' % M),
        (
            rb'{"\u006dodel":"m","x":{"model":"m"},%s}' % M,
            rb'{"\u006dodel":"new","x":{"model":"m"},%s}' % M,
        ),
        (
            b'{"x":{"model":"m"},%s,"model":"m"}' % M,
            b'{"x":{"model":"m"},%s,"model":"new"}' % M,
        ),
        (
            b'{"user":"\\"model\\":\\"m\\"","a":"model","model":"m",%s}' % M,
            b'{"user":"\\"model\\":\\"m\\"","a":"model","model":"new",%s}' % M,
        ),
        (
            '{"user":"ü中🙂","model":"m",%s}'.encode() % M,
            '{"user":"ü中🙂","model":"new",%s}'.encode() % M,
        ),
    ],
    ids=repr,
)
def test_only_the_models_name_changes_and_only_at_the_top(before: bytes, after: bytes) -> None:
    assert changed(before) == after


def test_usage_is_asked_for_where_it_was_not() -> None:
    assert changed(b'{"stream":true,"model":"new",%s}' % M) == (
        b'{"stream_options":{"include_usage":true},"stream":true,"model":"new",%s}' % M
    )
    assert changed(b'{"stream":true,"stream_options":{"include_usage":false,"x":1},%s}' % M) == (
        b'{"model":"new","stream":true,"stream_options":{"include_usage":true,"x":1},%s}' % M
    )
    assert changed(b'{"model":"m","stream":true,"stream_options":{},"x":"y",%s}' % M) == (
        b'{"model":"new","stream":true,"stream_options":{"include_usage":true},"x":"y",%s}' % M
    )
    assert changed(b'{"stream":true,"model":"new","stream_options":null,%s}' % M) == (
        b'{"stream":true,"model":"new","stream_options":{"include_usage":true},%s}' % M
    )


def test_usage_is_not_asked_for_when_the_endpoint_refuses_it_or_nothing_streams() -> None:
    body = b'{"stream":true,"model":"new",%s}' % M

    assert changed(body, ask_usage=False) == body
    assert changed(chat(), "m") == chat()


@pytest.mark.parametrize(
    "model", ['a"b', "a\\b", "a\nb", "ü/中", "a,b}"], ids=["quote", "slash", "LF", "wide", "comma"]
)
def test_any_name_of_a_model_is_written_as_valid_json(model: str) -> None:
    assert json.loads(changed(chat(), model))["model"] == model


def test_numbers_and_escapes_of_the_client_are_not_rewritten() -> None:
    messages = rb'"messages":[{"role":"u","content":"\u0041\ud83d\ude42\/"}]'
    numbers = b'"x":1.0e5,"y":123456789012345678901234567890'
    body = b'{"model":"m","metadata":{"model":"m"},%s,%s}' % (messages, numbers)

    assert changed(body) == body.replace(b'"m"', b'"new"', 1)


def test_members_are_added_to_an_empty_object_too() -> None:
    assert parse_object(b"{ }") == {}
    assert set_members(b"{ }", (), {"a": 1, "b": [2]}) == b'{"a":1,"b":[2] }'


KEYS = st.sampled_from(
    ["model", "stream", "stream_options", "n", "user", "x", "messages", 'q"', "é"]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)  # fmt: skip
SPELLINGS = ['"a"', '"\\u0061"', '"b"', '"a\\/"', '"a/"', '"é"', '"\\u00e9"', '"a b"', '""', '"x"']
VALUES = ["1", '"a"', '{"a":1}', '"\\u0041"', '"\\"a\\""', "[]"]


@given(st.lists(st.tuples(st.sampled_from(SPELLINGS), st.sampled_from(VALUES)), max_size=5))
def test_a_name_that_stands_twice_is_refused_in_whatever_spelling(
    members: list[tuple[str, str]],
) -> None:
    body = "{" + ",".join(f"{name} : {value}" for name, value in members) + "}"
    names = [name for name, _ in json.loads(body, object_pairs_hook=list)]
    if len(names) == len(set(names)):
        assert list(parse_object(body.encode())) == names
    else:
        with pytest.raises(GatewayError) as caught:
            parse_object(body.encode())
        assert caught.value.code == "duplicate_key"


EXTRA = st.dictionaries(
    st.sampled_from(["x", "metadata", "é", 'q"', "model_", ""]), JSON, max_size=4
)


@steady
@given(
    extra=EXTRA,
    model=st.sampled_from(["absent", None, "", "auto", "m", 'a"b', "ü"]),
    stream=st.booleans(),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_changed_body_means_the_same_but_for_what_changed(
    extra: dict[str, Any], model: str | None, stream: bool, ascii_only: bool,
    indent: int | None, shuffle: Any,
) -> None:  # fmt: skip
    fields = {**extra, "messages": MESSAGES, "stream": stream}
    if model != "absent":
        fields["model"] = model
    items = list(fields.items())
    shuffle.shuffle(items)
    body = json.dumps(dict(items), ensure_ascii=ascii_only, indent=indent).encode()

    result = json.loads(changed(body))

    expected = {**fields, "model": "new"}
    if stream:
        expected["stream_options"] = {"include_usage": True}
    assert result == expected


ODD = st.sampled_from(
    [b"{", b"}", b"[", b"]", b":", b",", b'"', b'"model"', b'"messages"', b'"stream"', b"true",
     b'"role"', b"null", b"1", b"1e999", rb'"\ud800"', b"\xff", b"\\", b" ", b"NaN", b"-"]
)  # fmt: skip


@steady
@given(st.sampled_from(Kind), st.lists(ODD, max_size=25).map(b"".join) | st.binary(max_size=60))
@example(CHAT, b"[" * 2000)
def test_no_bytes_raise_anything_but_a_gateway_error(kind: Kind, body: bytes) -> None:
    try:
        parse_request(kind, body).body_for("new", ask_usage=True)
    except GatewayError as error:
        error.body()


@steady
@given(st.sampled_from(Kind), st.dictionaries(KEYS | st.sampled_from(["prompt", "input"]), JSON))
def test_no_object_raises_anything_but_a_gateway_error(kind: Kind, fields: dict[str, Any]) -> None:
    try:
        parse_request(kind, json.dumps(fields).encode()).body_for("new", ask_usage=True)
    except GatewayError as error:
        error.body()


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("deep", [b"[", b'{"a":'], ids=["arrays", "objects"])
@pytest.mark.parametrize("depth", [63, 64, 250, 255, 900, 1000, 1023, 1024, 5000])
def test_no_depth_raises_anything_but_a_gateway_error(kind: Kind, deep: bytes, depth: int) -> None:
    close = b"]" if deep == b"[" else b"1}"
    core = deep * depth + (close * depth if deep == b"[" else b"1" + b"}" * depth)
    body = b'{"messages":[{"role":"u"}],"prompt":"","input":"","model":null,"x":' + core + b"}"

    try:
        request = parse_request(kind, body)
    except GatewayError:
        assert depth > 63
    else:
        assert json.loads(request.body_for("new", ask_usage=True))["model"] == "new"
