"""What a request belongs to: the same for all of a conversation, another for every other one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from citadel_gateway.errors import GatewayError
from citadel_gateway.wire.openai_request import Kind, parse_request
from citadel_gateway.wire.session import parse_with_key

SYSTEM = {"role": "system", "content": "You are kind."}
HELLO = {"role": "user", "content": "Hello"}
PICTURE = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ],
}


def key(kind: Kind = Kind.CHAT, header: bytes | None = None, **fields: Any) -> int | None:
    return parse_with_key(kind, orjson.dumps(fields), header)[1]


def chat(*messages: dict[str, Any], header: bytes | None = None, **fields: Any) -> int | None:
    return key(Kind.CHAT, header, messages=list(messages), **fields)


def test_the_header_comes_first_and_then_what_the_body_calls_it() -> None:
    by_header = chat(HELLO, header=b"s1", session_id="s2", user="s4")

    assert by_header == chat(SYSTEM, HELLO, header=b"s1")
    assert chat(HELLO, session_id="s2", prompt_cache_key="s3", user="s4") == chat(
        HELLO, header=b"s2"
    )
    assert chat(HELLO, prompt_cache_key="s3", user="s4") == chat(HELLO, header=b"s3")
    assert chat(HELLO, user="s4") == chat(SYSTEM, user="s4") == chat(HELLO, header=b"s4")


def chat_of(turns: int) -> list[dict[str, Any]]:
    later = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]
    return [SYSTEM, HELLO, *later * turns]


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    keys = {chat(*chat_of(turns), temperature=turns / 10) for turns in range(4)}

    assert len(keys) == 1


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, {"role": "user", "content": "Bye"}],
        [{"role": "system", "content": "You are not."}, HELLO],
        [HELLO],
        [SYSTEM, PICTURE],
        [SYSTEM],
        [{"role": "developer", "content": "You are kind."}, HELLO],
        [SYSTEM, {"role": "user", "content": None}],
    ],
)
def test_another_beginning_is_another_conversation(messages: list[dict[str, Any]]) -> None:
    assert chat(*messages) != chat(SYSTEM, HELLO)


def test_a_conversation_may_begin_with_a_picture() -> None:
    other = {**PICTURE, "content": [PICTURE["content"][0], {"type": "image_url", "image_url": {}}]}

    assert chat(PICTURE) == chat(PICTURE, HELLO)
    assert chat(PICTURE) != chat(other)


@pytest.mark.parametrize("nothing", ["", None, 7, ["a"]])
def test_a_name_that_is_none_is_passed_over(nothing: object) -> None:
    assert chat(HELLO, header=b"", session_id=nothing) == chat(HELLO)


def test_prompts_go_by_their_beginning() -> None:
    long = "x" * 5000

    assert key(Kind.COMPLETIONS, prompt=long) == key(Kind.COMPLETIONS, prompt=long + " and on")
    assert key(Kind.COMPLETIONS, prompt="a") != key(Kind.COMPLETIONS, prompt="b")
    assert key(Kind.COMPLETIONS, prompt=["a"]) != key(Kind.COMPLETIONS, prompt=["b"])
    assert key(Kind.COMPLETIONS, prompt=[1, 2]) != key(Kind.COMPLETIONS, prompt=[1, 3])


def test_inputs_of_embeddings_belong_to_nothing_unless_they_say_so() -> None:
    assert key(Kind.EMBEDDINGS, input="a") is None
    assert key(Kind.EMBEDDINGS, input="a", user="u") == key(Kind.EMBEDDINGS, input="b", user="u")


def test_it_is_the_same_in_every_process_and_version() -> None:
    assert chat(HELLO, header=b"s1") == 0x89A147DA21BB2954
    assert chat(SYSTEM, HELLO) == 0xB735F35B1C3DC784


def test_the_request_is_read_as_without_a_key() -> None:
    body = orjson.dumps({"model": "m", "messages": [HELLO], "stream": True})

    assert parse_with_key(Kind.CHAT, body, None)[0] == parse_request(Kind.CHAT, body)
    with pytest.raises(GatewayError, match="'messages' is required"):
        parse_with_key(Kind.CHAT, b"{}", None)
