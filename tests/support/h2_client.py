"""A client that speaks HTTP/2 on the h2 library, and can be told to behave badly."""

from __future__ import annotations

import json as jsonlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.settings import SettingCodes

Pairs = Iterable[tuple[str, str]]


@attrs.define(eq=False)
class H2Answer:
    """What came back on one stream.

    :param reset: the error code, if the server has reset it.
    """

    stream_id: int
    status: int = 0
    headers: list[tuple[str, str]] = attrs.field(factory=list)
    body: bytes = b""
    complete: bool = False
    reset: int | None = None
    informed: list[int] = attrs.field(factory=list)  # status codes before the real one

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return jsonlib.loads(self.body)


@attrs.define(eq=False)
class H2Client:
    """One connection.  Windows are opened as data comes, unless *lazy*.

    :param window: the initial window of each stream.
    :param deaf: reads no more from the socket, after what it reads next.
    :param goaways: what the server said in GOAWAY: last stream, and error code.
    """

    stream: trio.abc.Stream
    window: int = 65_535
    lazy: bool = False
    deaf: bool = attrs.field(default=False, init=False)
    goaways: list[tuple[int, int]] = attrs.field(factory=list, init=False)
    pongs: int = attrs.field(default=0, init=False)
    ended: bool = attrs.field(default=False, init=False)
    answers: dict[int, H2Answer] = attrs.field(factory=dict, init=False)
    h2: h2.connection.H2Connection = attrs.field(init=False)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)
    _sending: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _unread: bytes = attrs.field(default=b"", init=False)

    def __attrs_post_init__(self) -> None:
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)

    async def start(self) -> None:
        settings = {SettingCodes.INITIAL_WINDOW_SIZE: self.window, SettingCodes.ENABLE_PUSH: 0}
        self.h2.local_settings = h2.settings.Settings(client=True, initial_values=settings)
        self.h2.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        await self.send(b"")

    async def send(self, data: bytes) -> None:
        """Bytes as they are, behind those that h2 has to send."""
        async with self._sending:
            if data := self.h2.data_to_send() + data:
                await self.stream.send_all(data)

    # Requests.

    def open(
        self,
        method: str = "GET",
        path: str = "/",
        headers: Pairs = (),
        *,
        body: bytes | None = None,
        end: bool = True,
    ) -> H2Answer:
        """Begin a request; it goes out with the next :meth:`flush`."""
        stream_id = self.h2.get_next_available_stream_id()
        pairs = [
            (":method", method),
            (":scheme", "https"),
            (":authority", "gateway"),
            (":path", path),
            *headers,
        ]
        self.h2.send_headers(stream_id, pairs, end_stream=end and body is None)
        if body is not None:
            self.h2.send_data(stream_id, body, end_stream=end)
        found = self.answers[stream_id] = H2Answer(stream_id)
        return found

    async def ask(self, method: str = "GET", path: str = "/", **options: Any) -> H2Answer:
        """Begin a request and send it."""
        answer = self.open(method, path, **options)
        await self.flush()
        return answer

    async def post(self, path: str, json: object, headers: Pairs = ()) -> H2Answer:
        headers = [("content-type", "application/json"), *headers]
        return await self.ask("POST", path, headers=headers, body=jsonlib.dumps(json).encode())

    async def fetch(self, method: str = "GET", path: str = "/", **options: Any) -> H2Answer:
        """A request and its whole answer."""
        return await self.finish(await self.ask(method, path, **options))

    async def upload(self, answer: H2Answer, size: int) -> None:
        """Send *size* bytes of a body as fast as the server lets us, or until it resets."""
        while size and answer.reset is None and not self.ended:
            window = self.h2.local_flow_control_window(answer.stream_id)
            piece = min(size, window, self.h2.max_outbound_frame_size)
            if piece <= 0:
                await self.news()
                continue
            self.h2.send_data(answer.stream_id, bytes(piece))
            size -= piece
            await self.flush()

    async def give_up(self, answer: H2Answer) -> None:
        self.h2.reset_stream(answer.stream_id, 8)  # CANCEL
        await self.flush()

    # What comes.

    async def news(self) -> None:
        await self._news.wait()

    async def finish(self, answer: H2Answer) -> H2Answer:
        """Wait until *answer* is complete, reset or cut."""
        while not (answer.complete or answer.reset is not None or self.ended):
            await self.news()
        return answer

    async def until(self, answer: H2Answer, *, size: int = 0) -> None:
        """Wait for the head, and so many bytes of the body."""
        while not self.ended and not (answer.status and len(answer.body) >= size):
            await self.news()

    async def until_ended(self) -> None:
        while not self.ended:
            await self.news()

    async def read(self) -> None:
        """Take what comes until the server closes."""
        try:
            while data := bytes(await self.stream.receive_some(65_536)):
                await self._feed(data)
                if self.deaf:
                    await trio.sleep_forever()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.ended = True
        self._tell()

    async def _feed(self, data: bytes) -> None:
        """Frame by frame, as h2 takes nothing more after a GOAWAY, and servers go on."""
        self._unread += data
        while len(self._unread) >= 9:
            size = 9 + int.from_bytes(self._unread[:3], "big")
            if len(self._unread) < size:
                break
            frame, self._unread = self._unread[:size], self._unread[size:]
            for event in self.h2.receive_data(frame):
                self._take(event)
        self._tell()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.flush()

    def _take(self, event: object) -> None:
        match event:
            case h2.events.ConnectionTerminated():
                self.goaways.append((event.last_stream_id or 0, int(event.error_code or 0)))
                self.h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN
            case h2.events.PingAckReceived():
                self.pongs += 1
            case h2.events.InformationalResponseReceived():
                _, status = event.headers[0]
                self.answers[event.stream_id].informed.append(int(status))
            case h2.events.ResponseReceived():
                answer = self.answers[event.stream_id]
                pairs = [(str(name), str(value)) for name, value in event.headers]
                answer.status = int(dict(pairs)[":status"])
                answer.headers = [pair for pair in pairs if pair[0] != ":status"]
            case h2.events.DataReceived():
                self.answers[event.stream_id].body += event.data
                if not self.lazy:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                self.answers[event.stream_id].complete = True
            case h2.events.StreamReset():
                self.answers[event.stream_id].reset = int(event.error_code)

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


@asynccontextmanager
async def h2_client(stream: trio.abc.Stream, **options: Any) -> AsyncIterator[H2Client]:
    """A client on *stream* that has begun; the stream is closed at the end."""
    client = H2Client(stream, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.read)
        try:
            await client.start()
            yield client
        finally:
            await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()
