"""Which engine it is that answers, as far as its own answers tell exactly.

A wrong guess is worse than none: an engine that does not know how to go on with a broken answer
would begin anew, and nobody could tell.  So a name alone is not enough where proxies copy it; the
whole shape has to be that engine's, of every model in the list.

- vLLM and SGLang put their names into ``owned_by`` of ``GET /v1/models``, beside ``root`` and
  ``max_model_len``, and vLLM adds ``parent`` and ``permission``.
- llama.cpp says ``llamacpp`` there beside ``meta``, and ``llama.cpp`` as its ``Server`` everywhere.
- Ollama has the four members of OpenAI's there and no other, says ``library`` of models of its
  own, and answers ``GET /api/version`` with nothing but that.
- Text Generation Inference has each model owned by itself, and names its router in ``GET /info``.
"""

from __future__ import annotations

from typing import Any

import attrs
import orjson

LLAMACPP_SERVER = "llama.cpp"
_CARD = {"id", "object", "created", "owned_by"}
_BESIDE = {
    "vllm": {"root", "parent", "max_model_len", "permission"},
    "sglang": {"root", "max_model_len"},
    "llamacpp": {"meta"},
}


@attrs.frozen
class Clue:
    """What the list of models says: an engine, or what more is to be asked.

    :param engine: what it is; empty if that cannot be said by now.
    :param ask: a path whose answer decides; empty if there is none.
    """

    engine: str = ""
    ask: str = ""


def read_models(body: bytes) -> Clue:
    """What the answer to ``GET /v1/models`` tells."""
    found = _load(body)
    cards = found.get("data")
    if not isinstance(cards, list) or not cards:
        return Clue()
    if not all(isinstance(card, dict) and card.keys() >= _CARD for card in cards):
        return Clue()
    names = {str(card["owned_by"]) for card in cards}
    for engine, beside in _BESIDE.items():
        if names == {engine}:
            is_its_own = all(card.keys() >= beside for card in cards)
            return Clue(engine) if is_its_own else Clue()
    if "library" in names and all(card.keys() == _CARD for card in cards):
        return Clue(ask="/api/version")
    if all(card["owned_by"] == card["id"] for card in cards):
        return Clue(ask="/info")
    return Clue()


def read_more(path: str, body: bytes) -> str:
    """The engine whose answer to *path* this is; empty if it is none's."""
    found = _load(body)
    match path:
        case "/api/version" if found.keys() == {"version"} and isinstance(found["version"], str):
            return "ollama"
        case "/info" if found.get("router") == "text-generation-router" and "model_id" in found:
            return "tgi"
        case _:
            return ""


def _load(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
