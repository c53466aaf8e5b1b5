"""Who is calling: API keys, kept as hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

import attrs

_LONGEST = 512
_BEARER = re.compile(rb"(?i:bearer) ([\x21-\x2b\x2d-\x7e]+)\Z")  # one space, no commas: one token
_NO_KEY = b"\0" * 32  # compared with when nothing matches, so that the work is the same


@attrs.frozen(kw_only=True)
class ApiKey:
    """A key that was recognised, or could be."""

    id: str
    digest: bytes
    allowed_models: frozenset[str] = frozenset()
    is_admin: bool = False

    def may_use(self, model: str) -> bool:
        return not self.allowed_models or model in self.allowed_models


@attrs.define(eq=False)
class KeyRing:
    """All keys.  A ring without keys lets everybody in."""

    _by_digest: dict[bytes, ApiKey] = attrs.field(factory=dict)

    @classmethod
    def of(cls, keys: list[ApiKey]) -> KeyRing:
        return cls({key.digest: key for key in keys})

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def find(self, authorization: list[bytes]) -> ApiKey | None:
        """The key that the ``Authorization`` headers carry, if there is just one and it is known.

        Keys are looked up by their whole SHA-256: they are random and long, so a slow hash would
        protect nothing and would let anybody burn our CPU.
        """
        if len(authorization) != 1 or len(authorization[0]) > _LONGEST:
            return None
        match = _BEARER.match(authorization[0])
        if match is None:
            return None
        digest = hashlib.sha256(match[1]).digest()
        found = self._by_digest.get(digest)
        same = hmac.compare_digest(digest, found.digest if found else _NO_KEY)
        return found if same else None


def generate_key(key_id: str) -> tuple[str, str]:
    """A new key for *key_id* and its SHA-256 in hexadecimal; only the latter is stored."""
    key = f"sk-cit-{key_id}-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()
