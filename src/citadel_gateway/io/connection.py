"""One connection to an upstream: a request at a time, over an anyio byte stream.

Under Trio and without TLS, bytes go straight to and from the socket below the stream.  anyio's and
Trio's own layers would cost more than everything else that is done with a chunk.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import anyio
import attrs
import sniffio
import trio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSAttribute

from citadel_gateway.io.dial import Origin
from citadel_gateway.wire.http1_response import BadResponse, CutShort, ResponseParser

_READ = 64 * 1024


class Interrupted(Exception):
    """The wait was ended by :meth:`Connection.interrupt`."""


@attrs.define(eq=False)
class Connection:
    """A stream and the response that is being read from it.

    A connection is good for another request only when the last request was sent whole, its
    response was complete, nothing followed it, and both sides meant to keep the connection.  In
    any doubt it is closed: a response must never reach the wrong request.
    """

    origin: Origin
    stream: ByteStream
    clock: Callable[[], float]
    idle_since: float = attrs.field(default=0.0, init=False)
    requests: int = attrs.field(default=0, init=False)
    waited: float = attrs.field(default=0.0, init=False)  # seconds, for the upstream to speak
    is_ending: bool = attrs.field(default=False, init=False)  # only its response's end is missing
    response: ResponseParser = attrs.field(factory=ResponseParser, init=False)
    _direct: socket.socket | None = attrs.field(default=None, init=False)
    _reading: anyio.CancelScope | None = attrs.field(default=None, init=False)
    _interrupted: bool = attrs.field(default=False, init=False)
    _raw: socket.socket | None = attrs.field(default=None, init=False)
    _poll: select.poll = attrs.field(factory=select.poll, init=False)
    _tls: ssl.SSLObject | None = attrs.field(default=None, init=False)
    _busy: bool = attrs.field(default=False, init=False)
    _sent: bool = attrs.field(default=False, init=False)
    _hung_up: bool = attrs.field(default=False, init=False)
    _mistake: BadResponse | None = attrs.field(default=None, init=False)
    _ended: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._raw = self.stream.extra(SocketAttribute.raw_socket, None)
        if self._raw is not None:
            self._poll.register(self._raw, select.POLLIN)
        self._tls = self.stream.extra(TLSAttribute.ssl_object, None)
        if self._tls is None and sniffio.current_async_library() == "trio":
            self._direct = self._raw

    @property
    def is_reused(self) -> bool:
        """Whether an earlier request went over it, so that the upstream may just have hung up."""
        return self.requests > 1

    async def send(self, request: bytes, *, bodiless: bool = False) -> None:
        """Write a whole request; raises ``OSError``.

        The response may be read even then: an upstream may refuse what it has not read.

        :param bodiless: the response has no body, whatever its head says (HEAD).
        """
        self.response.begin(bodiless=bodiless)
        self.requests += 1
        self.waited = 0.0
        self._busy = True
        self._sent = False
        try:
            if self._direct is not None:
                await _send_all(self._direct, request)
            else:
                with self._interruptible():
                    await self.stream.send(request)
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            await self._raise_if_ended_here()
            raise ConnectionResetError("the upstream closed the connection") from exc
        await self._raise_if_ended_here()
        self._sent = True

    async def read_head(self) -> ResponseParser:
        """Wait for the head of the response.

        Raises ``BadResponse`` (``CutShort`` when the upstream left) or ``OSError``.
        """
        response = self.response
        while not response.head_complete:
            await self._read_some()
        return response

    async def read_body(self) -> bytes:
        """Some of the body as soon as there is some; ``b""`` at its end.  Raises as the head."""
        response = self.response
        while True:
            if data := response.take_body():
                return data
            if response.complete:
                self._busy = False
                return b""
            if self._mistake is not None:
                raise self._mistake
            try:
                await self._read_some()
            except BadResponse as exc:
                self._mistake = exc  # raised behind what came before it in the same read

    @property
    def socket(self) -> socket.socket | None:
        """The socket that :meth:`receive_now` reads; ``None`` where it cannot be used."""
        return self._direct

    @property
    def is_flowing(self) -> bool:
        """More of the body is to be expected, and nothing stands in its way."""
        return not (self._ended or self.response.complete or self._mistake is not None)

    def receive_now(self) -> bytes:
        """Bytes of the response, if some have arrived, for :meth:`take_in`.

        Once :attr:`is_flowing` is false, :meth:`read_body` tells why.
        """
        if self._direct is None:
            return b""
        try:
            data = self._direct.recv(_READ)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
            if not (self._hung_up or self._interrupted):
                self._mistake = CutShort("the upstream reset the connection", started=True)
        self._ended = not data
        return data

    def take_in(self, data: bytes) -> bytes:
        """What :meth:`receive_now` has returned; returns what of the body is in it."""
        try:
            self.response.feed(data)
        except BadResponse as exc:
            self._mistake = exc
        return self.response.take_body()

    def leave_the_end(self) -> bool:
        """Do without what is left of the response, and wait for nobody.

        False where only waiting tells whether it has ended.  Else it is :attr:`is_ending` until
        :meth:`has_ended` says so.
        """
        if self._direct is None:
            return False
        is_good = self._sent and not (self._hung_up or self._interrupted)
        self.is_ending = is_good and self.response.reusable
        if self.is_ending:
            self.has_ended()
        return True

    def has_ended(self) -> bool:
        """Whether the end that was left is here by now."""
        if self.is_flowing and (data := self.receive_now()):
            self.take_in(data)
        if self.response.complete:
            self._busy = self.is_ending = False
        elif not self.is_flowing:
            self.is_ending = False  # nor will it
        return self.response.complete

    def give_up_the_end(self, request: int) -> None:
        """Hang up unless the response to its *request* has ended."""
        if self.is_ending and self.requests == request and not self.has_ended():
            self.is_ending = False
            self.hang_up()

    def is_reusable(self) -> bool:
        """Whether another request may follow, as far as the last one tells."""
        if not self.requests:
            return not self._hung_up
        response = self.response
        return (
            self._sent
            and not self._busy
            and not self._hung_up
            and not self._interrupted
            and response.reusable
            and not response.surplus
        )

    def is_stale(self) -> bool:
        """Whether something arrived while it was idle: an end of stream, or bytes nobody asked for.

        One system call, and only where there is a socket to ask about.
        """
        if self._raw is None:
            return False
        return bool(self._poll.poll(0)) or (self._tls is not None and _holds_something(self._tls))

    def hang_up(self) -> None:
        """Let the upstream know, this instant, that nobody listens any more.

        For whoever is about to cancel the task that uses the connection, and cannot wait until
        it is done with it.  That task notices nothing but its cancellation: an end that we made
        ourselves says nothing about the upstream.
        """
        self._hung_up = True
        if self._raw is not None:
            with suppress(OSError):
                self._raw.shutdown(socket.SHUT_RDWR)

    def interrupt(self) -> None:
        """End the wait that is under way, or the next one, with :class:`Interrupted`.

        For whoever watches the clock.  The connection is of no use afterwards.
        """
        self._interrupted = True
        if self._reading is not None:
            self._reading.cancel()
        elif self._direct is not None:
            with suppress(OSError):
                self._direct.shutdown(socket.SHUT_RDWR)

    async def aclose(self) -> None:
        """Hang up at once, even while being cancelled; never waits for the peer."""
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self.stream)

    async def _read_some(self) -> None:
        before = self.clock()
        try:
            if (sock := self._direct) is not None:
                await trio.lowlevel.wait_readable(sock)
                data = sock.recv(_READ)
            else:
                data = await self._receive_from_stream()
        except BlockingIOError:
            return  # nothing was there after all
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            await self._raise_if_ended_here()
            raise CutShort(
                "the upstream reset the connection", started=self.response.started
            ) from exc
        finally:
            self.waited += self.clock() - before
        if data:
            self.response.feed(data)
        else:
            await self._raise_if_ended_here()
            self.response.feed_eof()

    async def _receive_from_stream(self) -> bytes:
        with self._interruptible():
            try:
                return await self.stream.receive(_READ)
            except anyio.EndOfStream:
                pass
        return b""

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        if self._interrupted:
            raise Interrupted
        with anyio.CancelScope() as self._reading:
            yield
        self._reading = None

    async def _raise_if_ended_here(self) -> None:
        """An end that we made ourselves says nothing about the upstream."""
        if self._interrupted:
            raise Interrupted
        if self._hung_up:
            await anyio.sleep_forever()  # the cancellation is on its way


async def _send_all(sock: socket.socket, data: bytes) -> None:
    rest: bytes | memoryview = data
    while True:
        try:
            sent = sock.send(rest)
        except BlockingIOError:
            sent = 0
        if sent == len(rest):
            return  # at once, nearly always
        rest = memoryview(rest)[sent:]
        await trio.lowlevel.wait_writable(sock)


def _holds_something(tls: ssl.SSLObject) -> bool:
    """Whether records came along with the last ones that were asked for.

    They are off the socket already, where no poll sees them.
    """
    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError:
        pass
    return True
