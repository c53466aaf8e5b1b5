"""What is decided about a request from its head alone, before a byte of its body is read."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.share import burst_of
from citadel_gateway.errors import (
    body_too_large,
    invalid_request,
    rate_limited,
    unauthorized,
    unsupported_media_type,
)
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.auth import ApiKey, KeyRing
from citadel_gateway.policy.priority import CLASSES, RANKS, Party, Priority, rank_named
from citadel_gateway.policy.rate_limit import (
    Allowance,
    ClientBuckets,
    Refusal,
    TokenBucket,
    take,
)
from citadel_gateway.wire.headers import Fields, Headers, duration_ms, tracing

_MAX_FORWARDED = 10
_JSON = b"application/json"
_DEFAULT = RANKS[Priority.DEFAULT]


class Limiter:
    """All rate limits of the gateway: one for everybody, one for each client, one for each key.

    :param membership: of a store that keeps the buckets for several gateways, if there is one.
    """

    def __init__(self, config: GatewayConfigSchema, membership: Membership | None = None) -> None:
        self._membership = membership
        performance = config.performance
        self.is_enabled = performance.rate_limiting_enabled
        rate = performance.rate_limit_rps
        self._everybody = TokenBucket(rate, burst_of(rate, performance.rate_limit_burst))
        self._everybody.key = b"global"
        self._clients: ClientBuckets | None = None
        if (client_rate := performance.client_rate_limit_rps) is not None:
            burst = burst_of(client_rate, performance.client_rate_limit_burst)
            self._clients = ClientBuckets(client_rate, burst)
        self._keys = {
            str(key.id): TokenBucket(
                key.rate_limit_rps, burst_of(key.rate_limit_rps, key.rate_limit_burst)
            )
            for key in config.security.api_keys
            if key.rate_limit_rps is not None
        }
        for name, bucket in self._keys.items():
            bucket.key = b"key:" + name.encode()

    def take(self, client: str, key: ApiKey | None, now: float) -> Allowance | Refusal | None:
        """Spend one request of every limit that applies to *client*.

        ``None`` if it takes :meth:`take_far`.  Only while limits are enabled.
        """
        if self._membership is None:
            return take(self._buckets(client, key, now), now)
        return self._membership.take_nowait(self._buckets(client, key, self._membership.now()))

    async def take_far(self, client: str, key: ApiKey | None) -> Allowance | Refusal:
        """The same, over a round trip to the store."""
        if self._membership is None:
            raise RuntimeError("there is no store")
        return await self._membership.take(self._buckets(client, key, self._membership.now()))

    def _buckets(
        self, client: str, key: ApiKey | None, now: float
    ) -> list[tuple[str, TokenBucket]]:
        buckets = [("global", self._everybody)]
        own = self._keys.get(key.id) if key is not None else None
        if own is not None:
            buckets.append(("key", own))
        elif self._clients is not None:
            who = f"key:{key.id}" if key is not None else client
            buckets.append(("client", self._clients.of(who, now)))
        return buckets

    def take_over(self, before: Limiter, now: float) -> None:
        """Go on with what is left in the buckets of *before*, whatever the rates are now."""
        now = now if self._membership is None else self._membership.now()
        self._everybody.take_over(before._everybody, now)
        if self._clients is not None and before._clients is not None:
            self._clients.take_over(before._clients, now)
        for key_id, bucket in self._keys.items():
            if key_id in before._keys:
                bucket.take_over(before._keys[key_id], now)

    def forget_full(self, now: float) -> None:
        """Give back the memory of clients that have not been seen for a while."""
        if self._clients is not None:
            now = now if self._membership is None else self._membership.now()
            self._clients.forget_full(now)


def allowance_headers(allowance: Allowance) -> Headers:
    """OpenAI's headers for what is left of the tightest limit."""
    return [
        (b"x-ratelimit-limit-requests", b"%d" % allowance.limit),
        (b"x-ratelimit-remaining-requests", b"%d" % allowance.remaining),
        (b"x-ratelimit-reset-requests", duration_ms(allowance.reset)),
    ]


@attrs.frozen
class Visitor:
    """Who is asking."""

    client: str
    key: ApiKey | None


@attrs.frozen(kw_only=True)
class Findings:
    """What a head that is in order says; the same for every request that has this head.

    :param by: who found it: another one, with another configuration, has to look again.
    :param most: bytes that the body may have.
    :param allowed: seconds that the request may take, which the client may have *shortened*.
    :param longest: seconds that the client said it would wait.
    :param party: whose turn it takes in a queue.
    """

    by: Doorkeeper
    visitor: Visitor
    most: int
    allowed: float
    shortened: bool
    longest: float
    tracing: Headers
    party: Party


class Doorkeeper:
    """Lets requests in: the right key, the right limits, a body that we would read.

    :param on_rejected: told the name of each limit that refused a request.
    :param membership: of a store that keeps the limits for several gateways, if there is one.
    """

    def __init__(
        self,
        config: GatewayConfigSchema,
        on_rejected: Callable[[str], None],
        membership: Membership | None = None,
    ) -> None:
        self._on_rejected = on_rejected
        self._keys = KeyRing.of(
            [
                ApiKey(
                    id=key.id,
                    digest=bytes.fromhex(key.sha256),
                    allowed_models=frozenset(key.allowed_models),
                    is_admin=key.admin,
                )
                for key in config.security.api_keys
            ]
        )
        self._parties = {
            str(key.id): [
                Party(f"key:{key.id}", key.weight, max(rank, RANKS[key.max_priority]))
                for rank in range(len(CLASSES))
            ]
            for key in config.security.api_keys
        }
        self._proxies = [ipaddress.ip_network(n) for n in config.security.trusted_proxies]
        self._most_bytes = config.performance.max_body_bytes
        self._allowed = config.performance.request_timeout_seconds
        self._session_header = config.load_balancer.session_header.encode()
        self.limiter = Limiter(config, membership)

    def identify(self, scope: dict[str, Any], fields: Fields) -> Visitor:
        """Raises ``GatewayError`` 401 when a key is needed and not shown."""
        client = self._address(scope, fields)
        if not self._keys:
            return Visitor(client, None)
        shown = fields.values(b"authorization")
        key = self._keys.find(shown)
        if key is None:
            raise unauthorized(
                "The API key is not valid."
                if shown
                else "An API key is needed: send it as 'Authorization: Bearer KEY'."
            )
        return Visitor(client, key)

    def admit(self, visitor: Visitor, now: float) -> Headers | None:
        """Spend the visitor's rate limits; returns what to tell it about them.

        ``None`` if it takes :meth:`admit_far`.  Raises ``GatewayError`` 429.
        """
        limiter = self.limiter
        if not limiter.is_enabled:
            return []
        result = limiter.take(visitor.client, visitor.key, now)
        return None if result is None else self._told(result)

    async def admit_far(self, visitor: Visitor) -> Headers:
        """The same, over a round trip to the store.  Raises ``GatewayError`` 429."""
        return self._told(await self.limiter.take_far(visitor.client, visitor.key))

    def _told(self, result: Allowance | Refusal) -> Headers:
        if isinstance(result, Allowance):
            return allowance_headers(result)
        wait = result.retry_after
        error = rate_limited(
            f"Rate limit reached ({result.limit}). Try again in {wait:.3f} s.", wait
        )
        error.headers = tuple(allowance_headers(result.allowance))
        self._on_rejected(result.limit)
        raise error

    def known(self, fields: Fields) -> Findings | None:
        """What was found when this very head was here before."""
        found = fields.findings
        return found if isinstance(found, Findings) and found.by is self else None

    def examine(self, visitor: Visitor, fields: Fields) -> Findings:
        """Raises ``GatewayError`` 400, 413 or 415."""
        most = self.check_body(fields)
        longest = self.timeout(fields)
        found = fields.findings = Findings(
            by=self,
            visitor=visitor,
            most=most,
            allowed=min(longest, self._allowed),
            shortened=longest < self._allowed,
            longest=longest,
            tracing=tracing(fields, self._session_header),
            party=self.party(visitor, fields),
        )
        return found

    def check_body(self, fields: Fields) -> int:
        """The most bytes the body may have.  Raises ``GatewayError`` 400, 413 or 415."""
        content_types = fields.values(b"content-type")
        if len(content_types) > 1:
            raise invalid_request("There is more than one Content-Type.", param="content-type")
        if content_types and content_types[0] != _JSON and not _is_json(content_types[0]):
            raise unsupported_media_type("The Content-Type must be application/json.")
        encoding = fields.get(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            raise unsupported_media_type(
                "Compressed request bodies are not accepted.", "content-encoding"
            )
        length = fields.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._most_bytes:
            raise body_too_large(self._most_bytes)
        return self._most_bytes

    def timeout(self, fields: Fields) -> float:
        """Seconds that the client would wait; infinity if it does not say."""
        value = fields.get(b"x-citadel-timeout")
        if value is None:
            return math.inf
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise invalid_request(
                "The header x-citadel-timeout must be a number of seconds above zero.",
                param="x-citadel-timeout",
            )
        return seconds

    def party(self, visitor: Visitor, fields: Fields) -> Party:
        """Whose turn the request would take in a queue: its key's, or its client's.

        The class is the highest that the key may have, and ``default`` without a key;
        ``x-citadel-priority`` can name a lower one.  A name that is unknown means ``default``.
        """
        key, asked = visitor.key, fields.get(b"x-citadel-priority")
        rank = 0 if asked is None else rank_named(asked)
        if key is None:
            return Party(visitor.client, 1.0, max(rank, _DEFAULT))
        return self._parties[key.id][rank]

    def _address(self, scope: dict[str, Any], fields: Fields) -> str:
        """The client's address; behind trusted proxies, the last one that is not theirs."""
        peer: str = (scope.get("client") or ("unknown",))[0]
        if not self._proxies or not self._is_trusted(peer):
            return peer
        forwarded = b",".join(fields.values(b"x-forwarded-for")).decode("latin-1")
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        return _last_untrusted(hops[-_MAX_FORWARDED:], self._is_trusted) or peer

    def _is_trusted(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped  # how IPv4 peers look on an IPv6 listener
        return any(parsed in network for network in self._proxies)


def _last_untrusted(hops: Sequence[str], is_trusted: Callable[[str], bool]) -> str | None:
    for hop in reversed(hops):
        if not is_trusted(hop):
            try:
                return str(ipaddress.ip_address(hop))
            except ValueError:
                return None  # garbage: believe nothing of it
    return None


def _is_json(content_type: bytes) -> bool:
    kind, _, parameters = content_type.lower().partition(b";")
    charset = parameters.partition(b"charset=")[2].strip(b" \"'")
    return kind.strip() == _JSON and charset in {b"", b"utf-8", b"utf8"}
