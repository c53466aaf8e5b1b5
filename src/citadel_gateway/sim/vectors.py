"""Embedding vectors from words: deterministic, of length one, and near each other for like texts.

Every token adds a few signed ones at places its hash picks.  That is no language model, but texts
that share words do come out closer than texts that share none.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Sequence

_PLACES = 4


def embed(model: str, tokens: Sequence[str], width: int) -> list[float]:
    """The unit vector of *tokens*, in numbers that a 32-bit float holds exactly."""
    vector = [0.0] * width
    vector[0] = 1 / 64  # so that the length is never zero
    for token in tokens:
        word = f"{model}\0{token.strip().lower()}".encode("utf-8", "replace")
        digest = hashlib.blake2b(word, digest_size=_PLACES * 4).digest()
        for (bits,) in struct.iter_unpack("<I", digest):
            vector[(bits >> 1) % width] += 1.0 if bits & 1 else -1.0
    length = math.hypot(*vector) or 1.0
    return list(struct.unpack(f"<{width}f", _pack([x / length for x in vector])))


def as_base64(vector: Sequence[float]) -> str:
    """Little-endian 32-bit floats, as OpenAI encodes them."""
    return base64.b64encode(_pack(vector)).decode("ascii")


def _pack(vector: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)
