"""Opening streams: addresses, TLS, and whose fault a failure is."""

from __future__ import annotations

import datetime
import errno
import os
import resource
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import attrs
import pytest
import trio
import trio.testing
import trustme
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSAttribute

from citadel_gateway.config.schema import TlsConfig
from citadel_gateway.io.dial import Dialer, Origin, is_our_own_lack, make_connect
from citadel_gateway.io.resolver import Resolver
from tests.support.memory_net import MemoryByteStream
from tests.support.openfds import open_descriptors
from tests.support.raw_client import reset_stream
from tests.support.step_cancel import cancel_at

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.mark.parametrize(
    ("origin", "authority"),
    [
        (Origin("http", "engine", 80), b"engine"),
        (Origin("http", "engine", 8000), b"engine:8000"),
        (Origin("https", "engine", 443), b"engine"),
        (Origin("https", "engine", 80), b"engine:80"),
        (Origin("http", "::1", 80), b"[::1]"),
        (Origin("http", "::1", 8000), b"[::1]:8000"),
        (Origin("http", "engine", 8000, address="10.0.0.1"), b"engine:8000"),
        (Origin("http", "localhost", 80, socket="/run/engine.sock"), b"localhost"),
    ],
)
def test_the_host_header_names_the_port_unless_it_is_the_usual_one(
    origin: Origin, authority: bytes
) -> None:
    assert origin.authority == authority


def wrapped(*reasons: OSError) -> OSError:
    """What anyio makes of its attempts to connect."""
    error = OSError("All connection attempts failed")
    error.__cause__ = reasons[0] if len(reasons) == 1 else ExceptionGroup("attempts", reasons)
    return error


REFUSED = OSError(errno.ECONNREFUSED, "refused")
FULL = OSError(errno.EMFILE, "too many open files")
NO_ADDRESS = OSError(errno.EADDRNOTAVAIL, "no address")


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (FULL, True),
        (REFUSED, False),
        (wrapped(FULL), True),
        (wrapped(REFUSED), False),
        (wrapped(FULL, FULL), True),
        (wrapped(NO_ADDRESS, REFUSED), False),
        (ConnectionResetError("no number"), False),
    ],
)
def test_a_lack_is_ours_only_if_every_attempt_says_so(error: OSError, ours: bool) -> None:
    assert is_our_own_lack(error) is ours


async def listen(nursery: trio.Nursery, handler: Handler, host: str = "127.0.0.1") -> int:
    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, handler, 0, host=host)
    )
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def say_hello(stream: trio.SocketStream) -> None:
    await stream.send_all(b"hello")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_both_families_of_addresses_are_dialled(host: str, nursery: trio.Nursery) -> None:
    try:
        port = await listen(nursery, say_hello, host)
    except OSError:
        pytest.skip(f"no {host} here")
    stream = await make_connect()(Origin("http", host, port))
    async with stream:
        assert await stream.receive() == b"hello"
    nursery.cancel_scope.cancel()


async def test_a_unix_socket_is_dialled(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = str(tmp_path / "engine.sock")
    with trio.socket.socket(trio.socket.AF_UNIX) as listening:
        await listening.bind(path)
        listening.listen()
        nursery.start_soon(trio.serve_listeners, say_hello, [trio.SocketListener(listening)])
        stream = await make_connect()(Origin("http", "localhost", 80, socket=path))
        async with stream:
            assert await stream.receive() == b"hello"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fault", ["missing", "nobody listens", "no socket"])
async def test_a_unix_socket_that_cannot_be_used_is_an_os_error_and_not_our_lack(
    fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "engine.sock"
    match fault:
        case "nobody listens":
            with trio.socket.socket(trio.socket.AF_UNIX) as bound:
                await bound.bind(str(path))
        case "no socket":
            path.write_text("text")

    with pytest.raises(OSError) as caught:  # noqa: PT011 -- the type is the promise
        await make_connect()(Origin("http", "localhost", 80, socket=str(path)))

    assert not is_our_own_lack(caught.value)


# --- names -----------------------------------------------------------------------------------


def resolving(*addresses: str) -> tuple[Dialer, list[str]]:
    """A dialer for a name with *addresses*, and the list to change them in."""
    answer = [*addresses]

    async def lookup(_: str) -> list[str]:
        return [*answer]

    return make_connect(resolver=Resolver(ttl=1e-9, lookup=lookup)), answer


async def peer(dial: Dialer, port: int) -> str:
    """The address at which one connection to the name ends."""
    stream = await dial(Origin("http", "engine", port))
    async with stream:
        return str(stream.extra(SocketAttribute.remote_address)[0])


async def test_connections_are_spread_over_the_addresses_of_a_name(
    nursery: trio.Nursery,
) -> None:
    port = await listen(nursery, say_hello, "0.0.0.0")
    dial, _ = resolving("127.0.0.1", "127.0.0.2", "127.0.0.3")

    assert Counter([await peer(dial, port) for _ in range(9)]) == {
        "127.0.0.1": 3, "127.0.0.2": 3, "127.0.0.3": 3,
    }  # fmt: skip
    nursery.cancel_scope.cancel()


async def test_an_address_where_nobody_listens_is_passed_over(nursery: trio.Nursery) -> None:
    port = await listen(nursery, say_hello, "127.0.0.2")
    dial, _ = resolving("127.0.0.1", "127.0.0.2", "::1")

    assert {await peer(dial, port) for _ in range(6)} == {"127.0.0.2"}
    nursery.cancel_scope.cancel()


async def test_an_address_that_does_not_answer_holds_up_one_connection_only(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[tuple[float, str]] = []

    async def connect_tcp(host: str, port: int) -> ByteStream:
        dialled.append((trio.current_time(), host))
        if host == "10.0.0.1":
            await trio.sleep_forever()
        return MemoryByteStream(trio.testing.memory_stream_pair()[0])

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)

    async def lookup(_: str) -> list[str]:
        return ["10.0.0.1", "10.0.0.2"]

    dial = make_connect(resolver=Resolver(ttl=10, lookup=lookup))
    for _ in range(4):
        await anyio.aclose_forcefully(await dial(Origin("http", "engine", 80)))

    assert dialled == [(0, "10.0.0.1"), (0.25, "10.0.0.2")] + [(0.25, "10.0.0.2")] * 3


async def test_no_address_that_answers_is_an_os_error_and_not_our_lack() -> None:
    dial, _ = resolving("127.0.0.1", "127.0.0.2")
    with trio.socket.socket() as held:
        await held.bind(("0.0.0.0", 0))  # bound, not listening
        with pytest.raises(OSError, match="All connection") as caught:
            await peer(dial, held.getsockname()[1])

    assert not is_our_own_lack(caught.value)


async def test_a_connection_is_current_until_its_address_is_gone(nursery: trio.Nursery) -> None:
    port = await listen(nursery, say_hello, "0.0.0.0")
    dial, answer = resolving("127.0.0.1")
    origin = Origin("http", "engine", port)
    old = await dial(origin)
    at_first = dial.is_current(old)
    answer[:] = ["127.0.0.2"]
    new = await dial(origin)

    assert (at_first, dial.is_current(old), dial.is_current(new)) == (True, False, True)
    for stream in (old, new):
        await anyio.aclose_forcefully(stream)
    nursery.cancel_scope.cancel()


async def test_an_origin_with_an_address_asks_no_name_server(nursery: trio.Nursery) -> None:
    port = await listen(nursery, say_hello, "127.0.0.2")
    dial, _ = resolving()
    stream = await dial(Origin("http", "engine", port, address="127.0.0.2"))
    async with stream:
        assert await stream.receive() == b"hello"
        assert dial.is_current(stream)
    nursery.cancel_scope.cancel()


async def test_a_closed_port_is_an_os_error_and_not_our_lack(nursery: trio.Nursery) -> None:
    with trio.socket.socket() as held:
        await held.bind(("127.0.0.1", 0))  # bound, not listening
        with pytest.raises(OSError, match="All connection") as caught:
            await make_connect()(Origin("http", "127.0.0.1", held.getsockname()[1]))

    assert not is_our_own_lack(caught.value)


async def test_running_out_of_descriptors_is_our_own_lack(nursery: trio.Nursery) -> None:
    port = await listen(nursery, say_hello)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(next_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, before[1]))
    try:
        with pytest.raises(OSError, match="All connection") as caught:
            await make_connect()(Origin("http", "127.0.0.1", port))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert is_our_own_lack(caught.value)
    nursery.cancel_scope.cancel()


# --- TLS -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def speaking_tls(
    authority: trustme.CA, name: str, context: ssl.SSLContext | None = None
) -> Handler:
    if context is None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(context)

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await tls.send_all(b"hello")
            await tls.receive_some()
        except trio.BrokenResourceError:
            pass  # the client did not like us

    return serve


@attrs.frozen
class Files:
    """What an administrator has on disk."""

    ca: str
    cert: str
    key: str

    @classmethod
    def of(cls, directory: Path, authority: trustme.CA) -> Files:
        issued = authority.issue_cert("gateway.example")
        paths = [str(directory / name) for name in ("ca.pem", "cert.pem", "key.pem")]
        authority.cert_pem.write_to_path(paths[0])
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(paths[1], append=number > 0)
        issued.private_key_pem.write_to_path(paths[2])
        return cls(*paths)


async def dial_tls(port: int, tls: TlsConfig, dial: Dialer | None = None) -> bytes:
    stream = await (dial or make_connect())(Origin("https", "127.0.0.1", port, tls=tls))
    async with stream:
        assert stream.extra(TLSAttribute.alpn_protocol) in {None, "http/1.1"}
        return await stream.receive()


async def test_authorities_from_a_file_replace_the_systems(
    authority: trustme.CA, tmp_path: Path, nursery: trio.Nursery
) -> None:
    port = await listen(nursery, speaking_tls(authority, "127.0.0.1"))
    ours = Files.of(tmp_path, authority)

    assert await dial_tls(port, TlsConfig(ca_file=ours.ca)) == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        await dial_tls(port, TlsConfig())
    nursery.cancel_scope.cancel()


async def test_the_certificate_may_have_another_name_than_the_address(
    authority: trustme.CA, tmp_path: Path, nursery: trio.Nursery
) -> None:
    port = await listen(nursery, speaking_tls(authority, "engine.example"))
    ours = Files.of(tmp_path, authority)

    named = TlsConfig(ca_file=ours.ca, server_name="engine.example")
    assert await dial_tls(port, named) == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        await dial_tls(port, TlsConfig(ca_file=ours.ca))
    nursery.cancel_scope.cancel()


async def test_at_an_address_of_its_own_the_certificate_has_the_hosts_name(
    authority: trustme.CA, nursery: trio.Nursery
) -> None:
    port = await listen(nursery, speaking_tls(authority, "engine.example"))
    origin = Origin("https", "engine.example", port, address="127.0.0.1")
    stream = await make_connect(trusting(authority))(origin)
    async with stream:
        assert await stream.receive() == b"hello"
    nursery.cancel_scope.cancel()


async def test_unverified_means_any_certificate(
    authority: trustme.CA, nursery: trio.Nursery
) -> None:
    port = await listen(nursery, speaking_tls(authority, "other.example"))

    assert await dial_tls(port, TlsConfig(insecure_skip_verify=True)) == b"hello"
    nursery.cancel_scope.cancel()


async def test_an_expired_certificate_is_refused(
    authority: trustme.CA, tmp_path: Path, nursery: trio.Nursery
) -> None:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", not_after=past).configure_cert(context)
    port = await listen(nursery, speaking_tls(authority, "127.0.0.1", context))
    ours = Files.of(tmp_path, authority)

    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        await dial_tls(port, TlsConfig(ca_file=ours.ca))
    nursery.cancel_scope.cancel()


async def test_our_own_certificate_is_shown_to_who_asks_for_it(
    authority: trustme.CA, tmp_path: Path, nursery: trio.Nursery
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    port = await listen(nursery, speaking_tls(authority, "127.0.0.1", context))
    ours = Files.of(tmp_path, authority)

    shown = TlsConfig(ca_file=ours.ca, cert_file=ours.cert, key_file=ours.key)
    assert await dial_tls(port, shown) == b"hello"
    with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError, OSError)):
        await dial_tls(port, TlsConfig(ca_file=ours.ca))
    nursery.cancel_scope.cancel()


def test_a_context_is_made_once_for_each_setting(authority: trustme.CA, tmp_path: Path) -> None:
    ours = Files.of(tmp_path, authority)
    dial = make_connect()

    one, other = (
        dial.context_for(TlsConfig(ca_file=ours.ca, server_name=name)) for name in ("a", "b")
    )
    assert one is other
    assert one is not dial.context_for(TlsConfig(ca_file=ours.ca, insecure_skip_verify=True))
    assert dial.context_for(None) is dial.context_for(TlsConfig())


async def hang_up(stream: trio.SocketStream) -> None:
    await stream.receive_some()


async def reset(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await reset_stream(stream)


async def speak_plainly(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_tls_checks_names_and_addresses(
    name: str, authority: trustme.CA, nursery: trio.Nursery
) -> None:
    port = await listen(nursery, speaking_tls(authority, name))
    stream = await make_connect(trusting(authority))(Origin("https", name, port))
    async with stream:
        assert await stream.receive() == b"hello"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fault", ["wrong name", "unknown authority", "plain", "fin", "rst"])
async def test_a_failed_handshake_is_an_os_error_and_leaves_no_socket(
    fault: str, authority: trustme.CA, nursery: trio.Nursery
) -> None:
    handlers: dict[str, Handler] = {
        "wrong name": speaking_tls(authority, "other.example"),
        "unknown authority": speaking_tls(trustme.CA(), "127.0.0.1"),
        "plain": speak_plainly,
        "fin": hang_up,
        "rst": reset,
    }
    connect = make_connect(trusting(authority))
    async with trio.open_nursery() as serving:
        port = await listen(serving, handlers[fault])
        before = open_descriptors()
        with pytest.raises(OSError) as caught:  # noqa: PT011 -- the type is the promise
            await connect(Origin("https", "127.0.0.1", port))
        kind = ConnectionResetError if fault in {"fin", "rst"} else ssl.SSLError
        assert isinstance(caught.value, kind)
        serving.cancel_scope.cancel()

    assert open_descriptors() <= before - 1  # without the listener


async def test_cancelling_a_handshake_hangs_up(
    authority: trustme.CA, nursery: trio.Nursery
) -> None:
    spoken, left = trio.Event(), trio.Event()

    async def say_nothing(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        spoken.set()
        while await stream.receive_some():
            pass
        left.set()

    port = await listen(nursery, say_nothing)

    async def dial() -> ByteStream:
        return await make_connect(trusting(authority))(Origin("https", "127.0.0.1", port))

    with trio.fail_after(5):
        async with trio.open_nursery() as dialling:
            dialling.start_soon(dial)
            await spoken.wait()
            dialling.cancel_scope.cancel()
        await left.wait()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_cancelling_a_dial_at_any_step_leaves_no_socket(
    scheme: str, authority: trustme.CA, nursery: trio.Nursery
) -> None:
    served = speaking_tls(authority, "127.0.0.1") if scheme == "https" else hang_up
    open_now, all_gone = 0, trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal open_now, all_gone
        open_now += 1
        all_gone = trio.Event()
        await served(stream)
        await stream.aclose()
        open_now -= 1
        if not open_now:
            all_gone.set()

    origin = Origin(scheme, "127.0.0.1", await listen(nursery, serve))
    connect = make_connect(trusting(authority))
    before = open_descriptors()

    async def dial_and_leave() -> None:
        stream = await connect(origin)
        await anyio.aclose_forcefully(stream)

    with trio.fail_after(5):
        for step in range(1, 1000):
            if not await cancel_at(step, dial_and_leave):
                break
        # Connections are accepted in order, so that this one is the last to be served.
        async with await connect(origin) as last:
            await last.send(b"hello")
            await trio.testing.wait_all_tasks_blocked()
        while open_now:
            await all_gone.wait()

    assert step > 3
    assert open_descriptors() == before
    nursery.cancel_scope.cancel()
