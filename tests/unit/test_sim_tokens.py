from __future__ import annotations

import base64
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citadel_gateway.sim.profile import PROFILES, profile_for
from citadel_gateway.sim.tokens import make_answer, tokenize
from citadel_gateway.sim.vectors import as_base64, embed

PROMPT = tokenize("<|user|>\nWhy is the sky blue?\n<|assistant|>\n")


@given(st.text())
def test_tokens_join_to_the_text_they_came_from(text: str) -> None:
    assert "".join(tokenize(text)) == text


def test_a_token_is_near_four_characters_of_english() -> None:
    text = "The quick brown fox considers whether international travel is worthwhile. " * 20

    assert 3 <= len(text) / len(tokenize(text)) <= 5


def test_an_answer_begins_by_saying_that_it_is_simulated() -> None:
    answer = make_answer("hermes-2", PROMPT, limit=1000)

    assert answer.text.startswith("[simulated hermes-2] ")
    assert answer.finish_reason == "stop"


def test_the_same_prompt_gets_the_same_answer_and_other_choices_differ() -> None:
    first = make_answer("hermes-2", PROMPT, limit=1000)

    assert make_answer("hermes-2", PROMPT, limit=1000) == first
    assert make_answer("hermes-2", PROMPT, limit=1000, index=1) != first
    assert make_answer("phi-3-mini", PROMPT, limit=1000) != first


@pytest.mark.parametrize("limit", [1, 2, 7, 29])
def test_the_limit_is_obeyed_exactly_and_only_shortens(limit: int) -> None:
    answer = make_answer("hermes-2", PROMPT, limit=limit)

    assert (len(answer.tokens), answer.finish_reason) == (limit, "length")
    assert answer.tokens == make_answer("hermes-2", PROMPT, limit=1000).tokens[:limit]


def test_ignoring_the_end_of_text_fills_the_limit() -> None:
    answer = make_answer("hermes-2", PROMPT, limit=500, ignore_eos=True)

    assert (len(answer.tokens), answer.finish_reason) == (500, "length")


def test_an_answer_ends_before_the_first_stop_string_even_inside_a_token() -> None:
    answer = make_answer("hermes-2", PROMPT, limit=1000, stop=["mulated", "nowhere", "ermes"])

    assert (answer.text, answer.finish_reason) == ("[si", "stop")
    assert all(answer.tokens)


def test_a_stop_string_at_the_very_start_leaves_nothing() -> None:
    assert make_answer("hermes-2", PROMPT, limit=9, stop=["["]).tokens == ()


@given(st.lists(st.text(min_size=1)), st.sampled_from([1, 8, 384]))
def test_embeddings_have_length_one(tokens: list[str], width: int) -> None:
    vector = embed("m", tokens, width)

    assert len(vector) == width
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


def test_both_encodings_of_an_embedding_are_the_same_numbers() -> None:
    vector = embed("m", tokenize("hello there"), 8)

    assert list(struct.unpack("<8f", base64.b64decode(as_base64(vector)))) == vector


def test_texts_that_share_words_are_closer_than_texts_that_do_not() -> None:
    def likeness(one: str, other: str) -> float:
        first, second = (embed("m", tokenize(text), 384) for text in (one, other))
        return sum(x * y for x, y in zip(first, second, strict=True))

    near = likeness("how do I reset my password", "please reset the password")
    assert near > likeness("how do I reset my password", "ships sail over green oceans") + 0.2


def test_the_large_mixture_is_slowest_and_fifty_tokens_suit_a_demo() -> None:
    by_speed = sorted(PROFILES.values(), key=lambda p: p.decode_rate)

    assert by_speed[0].model == "mixtral-8x7b"
    assert by_speed[-1].model == "phi-3-mini"
    assert all(0.14 <= 50 * p.token_seconds(1) <= 0.5 for p in by_speed)


def test_any_other_model_gets_a_profile_under_its_own_name() -> None:
    assert profile_for("someone/else").model == "someone/else"
    assert profile_for("hermes-2") is PROFILES["hermes-2"]
