"""Opening a byte stream to an upstream: over TCP or a Unix socket, plain or TLS."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias
from weakref import WeakKeyDictionary

import anyio
import attrs
from anyio.abc import ByteStream, SocketStream
from anyio.streams.tls import TLSStream

from citadel_gateway.config.schema import TlsConfig
from citadel_gateway.io.resolver import Resolver, is_address


@attrs.frozen(cache_hash=True)
class Origin:
    """Where connections go: all that two requests must share to use the same one.

    :param address: the only one of the host's addresses to go to.
    :param socket: path of a Unix socket to go to instead.
    :param tls: how to speak TLS, other than as usual.
    """

    scheme: str
    host: str
    port: int
    address: str | None = None
    socket: str | None = None
    tls: TlsConfig | None = None

    @property
    def authority(self) -> bytes:
        """The value of the Host header."""
        if self.socket is not None:
            return self.host.encode("ascii")
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = {"http": 80, "https": 443}.get(self.scheme)
        return (host if self.port == usual else f"{host}:{self.port}").encode("ascii")


Connect: TypeAlias = Callable[[Origin], Awaitable[ByteStream]]
"""Opens a stream to an origin, TLS included; raises ``OSError`` (``ssl.SSLError`` is one)."""

_HESITATION = 0.25  # seconds
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


def make_tls_context(tls: TlsConfig) -> ssl.SSLContext:
    """Raises ``OSError`` when a file cannot be read, or holds something else."""
    context = ssl.create_default_context(cafile=tls.ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def make_tls_contexts(
    settings: Iterable[TlsConfig | None],
) -> dict[TlsConfig | None, ssl.SSLContext]:
    """A context for each of *settings*, from the files as they are now.  Raises ``OSError``."""
    made: dict[TlsConfig, ssl.SSLContext] = {}
    found: dict[TlsConfig | None, ssl.SSLContext] = {}
    for tls in settings:
        setting = _setting(tls)
        if setting not in made:
            made[setting] = make_tls_context(setting)
        found[tls] = made[setting]
    return found


def _setting(tls: TlsConfig | None) -> TlsConfig:
    """What contexts are told apart by: the name is only asked for when one is used."""
    return attrs.evolve(tls or TlsConfig(), server_name=None)


class Dialer:
    """Connects over real networks.

    :param context: for TLS as usual; the system's authorities by default.
    :param resolver: knows the addresses of names; without one the system is asked every time.
    """

    def __init__(
        self, context: ssl.SSLContext | None = None, resolver: Resolver | None = None
    ) -> None:
        self._resolver = resolver
        self._contexts = {TlsConfig(): context} if context else {}
        self._latest: dict[TlsConfig, ssl.SSLContext] | None = None
        self._ends: WeakKeyDictionary[ByteStream, tuple[str, str]] = WeakKeyDictionary()

    async def __call__(self, origin: Origin) -> ByteStream:
        stream, address = await self._open(origin)
        if origin.scheme == "https":
            stream = await self._secure(stream, origin)
        if address is not None:
            self._ends[stream] = (origin.host, address)
        return stream

    def is_current(self, stream: ByteStream) -> bool:
        """Whether the other end is still one of the addresses that its name has."""
        end = self._ends.get(stream)
        return end is None or self._resolver is None or self._resolver.is_current(*end)

    def context_for(self, tls: TlsConfig | None) -> ssl.SSLContext:
        """Made once for each setting.  Raises ``OSError``."""
        setting = _setting(tls)
        context = self._contexts.get(setting)
        if context is None:
            context = self._contexts[setting] = make_tls_context(setting)
        return context

    def renew(self, contexts: Mapping[TlsConfig | None, ssl.SSLContext]) -> None:
        """Use *contexts*, from :func:`make_tls_contexts`, for new connections.

        Settings of just before keep theirs, for requests that began with them.
        """
        before = self._contexts if self._latest is None else self._latest
        self._latest = {_setting(tls): context for tls, context in contexts.items()}
        self._contexts = {**before, **self._latest}

    async def _open(self, origin: Origin) -> tuple[ByteStream, str | None]:
        """A stream, and its address if that is one of several the name could have."""
        if origin.socket is not None:
            return await anyio.connect_unix(origin.socket), None
        host = origin.address or origin.host
        if self._resolver is None or is_address(host):
            return await anyio.connect_tcp(host, origin.port), None
        order = await self._resolver.next_addresses(host)
        stream, address = await _connect_to_any(order, origin.port)
        for passed_over in order[: order.index(address)]:
            self._resolver.avoid(host, passed_over)
        return stream, address

    async def _secure(self, stream: ByteStream, origin: Origin) -> ByteStream:
        name = (origin.tls and origin.tls.server_name) or origin.host
        try:
            context = self.context_for(origin.tls)
            return await TLSStream.wrap(
                stream, hostname=name, ssl_context=context, standard_compatible=False
            )
        except (anyio.EndOfStream, anyio.BrokenResourceError) as exc:
            await anyio.aclose_forcefully(stream)
            raise ConnectionResetError(_HANDSHAKE_CUT) from exc
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise


def make_connect(context: ssl.SSLContext | None = None, resolver: Resolver | None = None) -> Dialer:
    """The connect function for real networks; IPv6 and IPv4 are raced where a name has both."""
    return Dialer(context, resolver)


async def _connect_to_any(addresses: list[str], port: int) -> tuple[SocketStream, str]:
    """The first connection that comes up; the next is tried when one fails, or hesitates."""
    if len(addresses) == 1:
        return await anyio.connect_tcp(addresses[0], port), addresses[0]
    won: list[tuple[SocketStream, str]] = []
    reasons: list[OSError] = []

    async def attempt(address: str, over: anyio.Event) -> None:
        try:
            stream = await anyio.connect_tcp(address, port)
        except OSError as exc:
            reasons.append(exc.__cause__ if isinstance(exc.__cause__, OSError) else exc)
            over.set()
            return
        if won:
            await anyio.aclose_forcefully(stream)
            return
        won.append((stream, address))
        racing.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as racing:
            for address in addresses:
                over = anyio.Event()
                racing.start_soon(attempt, address, over)
                with anyio.move_on_after(_HESITATION):
                    await over.wait()
    except BaseException:
        for stream, _ in won:
            await anyio.aclose_forcefully(stream)
        raise
    if won:
        return won[0]
    raise OSError("All connection attempts failed") from ExceptionGroup("attempts", reasons)
