"""An engine is recognised when its answers are exactly its own, and otherwise it is unknown."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from citadel_gateway.wire.engine_signs import Clue, read_models, read_more

OPENAI = {"id": "m", "object": "model", "created": 1}
SGLANG = {**OPENAI, "owned_by": "sglang", "root": "m", "parent": None, "max_model_len": 9}
VLLM = {**SGLANG, "owned_by": "vllm", "permission": [{"id": "modelperm-1"}]}
ADAPTER = {**VLLM, "id": "lora", "parent": "m", "max_model_len": None}
LLAMACPP = {**OPENAI, "owned_by": "llamacpp", "meta": {"n_ctx": 9}}
OLLAMA = {**OPENAI, "owned_by": "library"}
TGI = {**OPENAI, "created": 0, "owned_by": "m"}


def models(*cards: Any) -> bytes:
    return orjson.dumps({"object": "list", "data": list(cards)})


def without(card: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key != name}


@pytest.mark.parametrize(
    ("cards", "clue"),
    [
        ([VLLM], Clue("vllm")),
        ([VLLM, ADAPTER], Clue("vllm")),
        ([SGLANG], Clue("sglang")),
        ([LLAMACPP], Clue("llamacpp")),
        ([OLLAMA], Clue(ask="/api/version")),
        ([OLLAMA, {**OLLAMA, "owned_by": "somebody"}], Clue(ask="/api/version")),
        ([TGI], Clue(ask="/info")),
    ],
)
def test_a_list_of_models_says_whose_it_is(cards: list[Any], clue: Clue) -> None:
    assert read_models(models(*cards)) == clue


@pytest.mark.parametrize(
    "cards",
    [
        [],
        [{**OPENAI, "owned_by": "vllm"}],  # of a proxy that copies the name
        [without(VLLM, "permission")],
        [without(SGLANG, "max_model_len")],
        [{**OPENAI, "owned_by": "llamacpp"}],
        [VLLM, SGLANG],
        [VLLM, {**OPENAI, "owned_by": "vllm"}],
        [{**VLLM, "owned_by": "openai"}],
        [{**OPENAI, "owned_by": "citadel-sim", "max_model_len": 9}],
        [{**OLLAMA, "meta": {}}],
        [{**OPENAI, "owned_by": "somebody"}],
        [{**VLLM, "owned_by": None}],
        [{**VLLM, "owned_by": ["vllm"]}],
        [without(VLLM, "id")],
        ["vllm"],
        [None],
    ],
)
def test_whatever_is_not_exactly_one_engines_says_nothing(cards: list[Any]) -> None:
    assert read_models(models(*cards)) == Clue()


@pytest.mark.parametrize("body", [b"", b"vllm", b"[]", b"1", b"{}", b'{"data": {}}', b"\xff"])
def test_what_is_no_list_of_models_says_nothing(body: bytes) -> None:
    assert read_models(body) == Clue()


@pytest.mark.parametrize(
    ("path", "body", "engine"),
    [
        ("/api/version", b'{"version": "0.12.6"}', "ollama"),
        ("/api/version", b'{"version": "1", "name": "other"}', ""),
        ("/api/version", b'{"version": 1}', ""),
        ("/api/version", b"", ""),
        ("/info", b'{"model_id": "m", "router": "text-generation-router"}', "tgi"),
        ("/info", b'{"model_id": "m", "router": "other"}', ""),
        ("/info", b'{"model_id": "m"}', ""),
        ("/info", b"<html>", ""),
    ],
)
def test_the_answer_that_decides(path: str, body: bytes, engine: str) -> None:
    assert read_more(path, body) == engine
