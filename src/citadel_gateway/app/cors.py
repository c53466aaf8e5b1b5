"""Cross-origin calls: which pages may read our answers."""

from __future__ import annotations

import attrs

from citadel_gateway.config.schema import CorsConfig
from citadel_gateway.wire.headers import Fields, Headers

_EXPOSED = (
    b"x-request-id, x-citadel-model, x-citadel-backend, x-citadel-route-reason, "
    b"x-citadel-attempts, x-citadel-overhead-ms, retry-after, x-ratelimit-limit-requests, "
    b"x-ratelimit-remaining-requests, x-ratelimit-reset-requests"
)


@attrs.frozen
class Cors:
    """Exact origins, or ``*``; never with credentials, which the gateway does not use."""

    config: CorsConfig

    def headers(self, request: Fields) -> Headers:
        """What to add to an answer to *request*."""
        if not self.config.allow_origins:
            return []
        allowed = self._allowed(request.get(b"origin"))
        vary = [(b"vary", b"origin")]
        if allowed is None:
            return vary
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", _EXPOSED),
            *vary,
        ]

    def preflight(self, request: Fields) -> Headers:
        """The answer to a browser that asks before it calls; without leave unless it may."""
        found = self.headers(request)
        if len(found) > 1:
            found += [
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
                (b"access-control-allow-headers", ", ".join(self.config.allow_headers).encode()),
                (b"access-control-max-age", b"%d" % self.config.max_age),
            ]
        return found

    def _allowed(self, origin: bytes | None) -> bytes | None:
        if origin is None:
            return None
        if "*" in self.config.allow_origins:
            return b"*"
        return origin if origin.decode("latin-1") in self.config.allow_origins else None
