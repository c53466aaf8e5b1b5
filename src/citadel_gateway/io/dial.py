"""Opening a byte stream to an upstream."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio
import attrs
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream


@attrs.frozen
class Origin:
    """Where connections go: all that two requests must share to use the same one."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> bytes:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = {"http": 80, "https": 443}.get(self.scheme)
        return (host if self.port == usual else f"{host}:{self.port}").encode("ascii")


Connect: TypeAlias = Callable[[Origin], Awaitable[ByteStream]]
"""Opens a stream to an origin, TLS included; raises ``OSError`` (``ssl.SSLError`` is one)."""

_HANDSHAKE_CUT = "the upstream hung up during the TLS handshake"
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def is_our_own_lack(exc: OSError) -> bool:
    """Whether a failed dial says something about this machine instead of the upstream.

    anyio hides the reasons behind an error without a number: one, or one for each address.
    """
    match exc.__cause__:
        case OSError() as reason:
            reasons: tuple[BaseException, ...] = (reason,)
        case BaseExceptionGroup(exceptions=reasons):
            pass
        case _:
            reasons = (exc,)
    # All of them: a host without IPv6 lacks an address for it, and still learns about the other.
    return all(isinstance(reason, OSError) and reason.errno in _OURS for reason in reasons)


def make_connect(tls: ssl.SSLContext | None = None) -> Connect:
    """The connect function for real networks; IPv6 and IPv4 are raced where a name has both."""
    context = tls or ssl.create_default_context()

    async def connect(origin: Origin) -> ByteStream:
        stream = await anyio.connect_tcp(origin.host, origin.port)
        if origin.scheme != "https":
            return stream
        try:
            return await TLSStream.wrap(
                stream, hostname=origin.host, ssl_context=context, standard_compatible=False
            )
        except (anyio.EndOfStream, anyio.BrokenResourceError) as exc:
            await anyio.aclose_forcefully(stream)
            raise ConnectionResetError(_HANDSHAKE_CUT) from exc
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise

    return connect
