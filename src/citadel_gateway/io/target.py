"""What is sent to an upstream: to which address, which bytes, and how long it may take."""

from __future__ import annotations

import attrs

from citadel_gateway.io.dial import Origin
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.openai_request import InferenceRequest, Kind


@attrs.frozen(kw_only=True)
class Timing:
    """The clocks of one attempt, in seconds; ``deadline`` is a point in Trio's time.

    :param deadline: a whole answer, or the first token of a stream, must be here by then.
    :param shortened: the client asked for that deadline, so missing it is nobody's failure.
    """

    connect: float
    headers: float
    first_token: float
    idle: float
    total: float
    deadline: float
    allowed: float
    shortened: bool = False


@attrs.frozen(kw_only=True)
class Target:
    """How to speak to one endpoint; request heads are made once."""

    origin: Origin
    heads: dict[Kind, bytes] = attrs.field(repr=False)  # the key is in them

    @classmethod
    def of(cls, url: str, api_key: str | None, origin: Origin | None = None) -> Target:
        """*url* is an endpoint's base address; ``/v1`` is appended unless it is there.

        :param origin: where connections go, if *url* does not say everything.
        """
        usual, path = split_url(url)
        origin = origin or usual
        base = path if path.endswith("/v1") else path + "/v1"
        credentials = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        heads = {
            kind: (
                f"POST {base}{kind.value} HTTP/1.1\r\n"
                f"host: {origin.authority.decode()}\r\n"
                "content-type: application/json\r\n"
                "accept: application/json, text/event-stream\r\n"
                # Bytes are relayed as they come, so they had better not be compressed.
                "accept-encoding: identity\r\n"
                f"user-agent: citadel-gateway\r\n{credentials}"
            ).encode("ascii")
            for kind in Kind
        }
        return cls(origin=origin, heads=heads)


def split_url(url: str) -> tuple[Origin, str]:
    """The origin of a checked URL, and its path without a slash at the end."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        socket, _, path = rest.partition(":")
        return Origin("http", "localhost", 80, socket=socket), path.rstrip("/")
    authority, slash, path = rest.removeprefix("//").partition("/")
    host, colon, port = authority.rpartition(":")
    if not colon or "]" in port:
        host, port = authority, ""
    usual = 443 if scheme == "https" else 80
    origin = Origin(scheme, host.strip("[]"), int(port) if port else usual)
    return origin, (slash + path).rstrip("/")


@attrs.frozen(kw_only=True)
class Call:
    """What is sent: the request, its body for this endpoint, and the headers that go along.

    :param fresh: over a new connection, because an old one has just failed.
    """

    request: InferenceRequest
    body: bytes
    request_id: str
    tracing: Headers
    fresh: bool = False

    def encode(self, target: Target) -> bytes:
        extra = b"".join([b"%s: %s\r\n" % pair for pair in self.tracing])
        return b"%sx-request-id: %s\r\n%scontent-length: %d\r\n\r\n%s" % (
            target.heads[self.request.kind],
            self.request_id.encode("ascii"),
            extra,
            len(self.body),
            self.body,
        )
