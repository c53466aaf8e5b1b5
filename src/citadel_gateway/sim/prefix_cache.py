"""Which beginnings of prompts need not be read again.

Prompts are cut into blocks; a block's key covers everything before it, so equal keys mean equal
prefixes.  Only whole blocks are kept, as in vLLM, and the last token of a prompt is always read,
because its output is wanted.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import attrs


@attrs.define(eq=False)
class PrefixCache:
    """Least recently used blocks leave first, the end of a prompt before its beginning.

    :param capacity: in tokens.
    """

    capacity: int
    block: int = 16
    _blocks: OrderedDict[bytes, None] = attrs.field(factory=OrderedDict, init=False)

    def match(self, tokens: Sequence[str]) -> int:
        """How many leading *tokens* are remembered."""
        found = 0
        for key in self._keys(tokens[:-1]):
            if key not in self._blocks:
                break
            found += self.block
        return found

    def remember(self, tokens: Sequence[str]) -> None:
        for key in reversed(list(self._keys(tokens))):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) * self.block > self.capacity:
            self._blocks.popitem(last=False)

    def _keys(self, tokens: Sequence[str]) -> Iterator[bytes]:
        digest = hashlib.blake2b(digest_size=16)
        for end in range(self.block, len(tokens) + 1, self.block):
            block = tokens[end - self.block : end]
            digest.update("\0".join([*block, ""]).encode("utf-8", "replace"))
            yield digest.copy().digest()
