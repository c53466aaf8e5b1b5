"""Types of single values: a rule about one value lives in its type, so errors can name its path.

attrs validators would run in ``__init__`` and be reported at the class; a structure hook per type
is reported at the field.  The hooks are in :mod:`citadel_gateway.config.hooks`.
"""

from __future__ import annotations

import enum
from typing import NewType

Seconds = NewType("Seconds", float)
"""A duration above zero: ``2``, ``2.5``, ``"250ms"``, ``"30s"``, ``"5m"``, ``"1h"``."""

Grace = NewType("Grace", float)
"""A duration that may be zero, written like :data:`Seconds`."""

Port = NewType("Port", int)
"""A TCP port, 0 to 65535; 0 asks the system for a free one."""

Count = NewType("Count", int)
"""A whole number, at least 1."""

Room = NewType("Room", int)
"""A whole number, at least 0."""

Weight = NewType("Weight", float)
"""A finite number above zero."""

Rate = NewType("Rate", float)
"""Units per second, a finite number above zero."""

Cost = NewType("Cost", float)
"""A finite number, at least 0, in whatever currency the whole file uses."""

Ratio = NewType("Ratio", float)
"""A number from 0 to 1."""

Url = NewType("Url", str)
"""``http://host[:port][/path]``, ``https://...``, or ``unix:/path/of.sock[:/path]``.

Without credentials, query or fragment.
"""

StoreUrl = NewType("StoreUrl", str)
"""See :func:`citadel_gateway.config.store_url.parse_store_url`."""

KeyPrefix = NewType("KeyPrefix", str)
"""1 to 64 letters, digits, and any of ``._:-``."""

HeaderName = NewType("HeaderName", str)
"""The name of a header that begins with ``x-`` and is none of the gateway's own."""

UrlPath = NewType("UrlPath", str)
"""An absolute path such as ``/health``."""

Name = NewType("Name", str)
"""A non-empty name without white space or control characters, at most 128 characters."""

Secret = NewType("Secret", str)
"""A credential: as written, or ``env:NAME``, or ``file:PATH``.  Never printed."""

Sha256 = NewType("Sha256", str)
"""64 lower-case hexadecimal digits."""

Network = NewType("Network", str)
"""An IP address or CIDR network such as ``10.0.0.0/8``."""

Origin = NewType("Origin", str)
"""A browser origin such as ``https://chat.example.org``, or ``*``."""


class Algorithm(enum.Enum):
    """How one endpoint is picked among those that could take the request."""

    ROUND_ROBIN = "round_robin"
    WEIGHTED_ROUND_ROBIN = "weighted_round_robin"
    RANDOM = "random"
    LEAST_CONNECTIONS = "least_connections"
    POWER_OF_TWO = "power_of_two"
    LEAST_LATENCY = "least_latency"
    COST = "cost"
    CONSISTENT_HASH = "consistent_hash"
    SESSION_AFFINITY = "session_affinity"

    @property
    def goes_by_key(self) -> bool:
        """Whether it matters to it what a request belongs to."""
        return self in (Algorithm.CONSISTENT_HASH, Algorithm.SESSION_AFFINITY)


class Engine(enum.Enum):
    """Which server is behind an endpoint; it decides how its health is asked for."""

    AUTO = "auto"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMACPP = "llamacpp"
    OLLAMA = "ollama"
    TGI = "tgi"
    OPENAI = "openai"


class Resolve(enum.Enum):
    """What a name stands for.

    All its addresses together are one endpoint, or each is one of its own; or each server that its
    SRV records name is one.
    """

    TOGETHER = "together"
    EACH = "each"
    SRV = "srv"


class StoreKind(enum.Enum):
    """Where limits, caps and findings are kept that several gateways share."""

    AUTO = "auto"
    MEMORY = "memory"
    LMDB = "lmdb"
    REDIS = "redis"


class Capability(enum.Enum):
    """A kind of request that a model can answer."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"


class RetryAmbiguous(enum.Enum):
    """Whether a request may be sent again when the first endpoint may have begun to work on it."""

    STATELESS = "stateless"
    NEVER = "never"


class LogLevel(enum.Enum):
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class HttpServer(enum.Enum):
    """Who speaks HTTP/1.1 to clients: our connection on llhttp, or stock Hypercorn's on h11."""

    LLHTTP = "llhttp"
    HYPERCORN = "hypercorn"
