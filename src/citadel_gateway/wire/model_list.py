"""The names in the answer to ``GET /v1/models``."""

from __future__ import annotations

import re

import orjson

MOST = 1000
"""Names in a list that are read."""

_NAME = re.compile(r"[!-~]{1,128}")


def read_model_names(body: bytes) -> tuple[str, ...]:
    """Each once, and only those that a client could ask for; ``ValueError`` if it is no list.

    A list that is ``null`` is an empty one: Ollama writes that when it has no model.
    """
    found = orjson.loads(body)
    cards = found.get("data") if isinstance(found, dict) and "data" in found else 0
    if cards is not None and not isinstance(cards, list):
        raise ValueError("there is no list of models in it")
    names = [card.get("id") for card in cards or () if isinstance(card, dict)]
    fit = [name for name in names if isinstance(name, str) and _NAME.fullmatch(name)]
    return tuple(dict.fromkeys(fit))[:MOST]
