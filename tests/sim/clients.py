"""Simulated clients: they ask, wait, leave, dawdle or misbehave, and write down what they saw."""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs
import orjson
import trio

from tests.sim.draw import AskPlan, ClientPlan, Habit
from tests.sim.history import History
from tests.sim.wires import Wire
from tests.support.raw_client import NoResponseError, RawClient, RawResponse, http_request

MOST_RETURNS = 3


class Fate(enum.Enum):
    """How a request ended, as its client saw it."""

    ANSWERED = "answered"
    REFUSED = "refused"
    CUT = "cut"  # some of the answer, and then the end of the connection
    NOTHING = "nothing"  # not a byte of an answer
    UNREACHED = "not even a connection"
    LEFT = "left"


@attrs.define(eq=False)
class Seen:
    """One request, and what its client saw of the answer.

    :param began: its first byte was sent; :param sent: its last.
    :param dawdled: seconds that the client let the gateway wait, in one go or in several.
    :param first_on_connection: else the gateway may have closed the connection meanwhile.
    """

    id: str
    plan: AskPlan
    began: float
    first_on_connection: bool
    pipelined: bool = False
    sent: float | None = None
    dawdled: float = 0.0
    fate: Fate | None = None
    ended: float = 0.0
    response: RawResponse | None = None
    problem: str | None = None

    @property
    def status(self) -> int | None:
        return self.response.status if self.response is not None else None

    def error_code(self) -> str | None:
        """The code of a refusal."""
        if self.response is None or self.fate is not Fate.REFUSED:
            return None
        code: str | None = orjson.loads(self.response.body)["error"]["code"]
        return code


@attrs.define(eq=False)
class Client:
    """One client.

    :param knock: opens a connection to the gateway; raises ``OSError``.
    :param seen: everything that all clients saw, in the order in which they began.
    """

    plan: ClientPlan
    knock: Callable[[], Wire]
    seen: list[Seen]
    history: History
    _raw: RawClient | None = attrs.field(default=None, init=False)
    _wire: Wire = attrs.field(init=False)

    def _note(self, what: str) -> None:
        self.history.note(self.plan.name, what)

    async def run(self) -> None:
        await trio.sleep(self.plan.at)
        try:
            if self.plan.pipelines:
                await self._pipeline()
                return
            for ask in self.plan.asks:
                await trio.sleep(ask.pause)
                await self._ask_and_return(ask)
        finally:
            self._close()

    async def _ask_and_return(self, ask: AskPlan) -> None:
        """Come back for as long as one is told when to, within reason."""
        for number in range(1 + ask.returns):
            seen = await self._ask(ask if not number else _again(ask, number))
            wait = seen.response.header("retry-after-ms") if seen.response is not None else None
            if seen.fate is not Fate.REFUSED or wait is None:
                return
            if number < ask.returns:
                self._note(f"will return in {wait} ms")
            await trio.sleep(int(wait) / 1000)

    async def _ask(self, ask: AskPlan) -> Seen:
        seen = self._begin(ask)
        raw = self._connect(seen)
        if raw is None:
            await trio.lowlevel.checkpoint()
            return seen
        patience = ask.after if ask.habit is Habit.LEAVES else 1_000_000.0
        with trio.move_on_after(patience) as waiting:
            try:
                if await self._send(raw, seen):
                    await self._read(raw, seen)
            except (NoResponseError, trio.BrokenResourceError):
                self._end(seen, Fate.NOTHING)
            except (ValueError, IndexError) as exc:
                seen.problem = f"an answer that is not HTTP: {exc}"
                self._end(seen, Fate.CUT)
        if waiting.cancelled_caught and seen.fate is None:
            self._end(seen, Fate.LEFT)
        if seen.fate not in {Fate.ANSWERED, Fate.REFUSED} or _is_last(seen.response):
            self._close()
        return seen

    async def _pipeline(self) -> None:
        """All requests at once; the answers come in their order, or not at all."""
        asks = [attrs.evolve(ask, habit=Habit.PATIENT) for ask in self.plan.asks]
        every = [self._begin(ask) for ask in asks]
        raw = self._connect(every[0])
        for seen in every:
            seen.pipelined = True
        if raw is None:
            for seen in every[1:]:
                self._end(seen, Fate.UNREACHED)
            return
        for place, seen in enumerate(every):
            seen.first_on_connection = place == 0
        try:
            await raw.send(b"".join(map(_encode, asks)))
            for seen in every:
                seen.sent = trio.current_time()
            for seen in every:
                await self._read(raw, seen)
        except (NoResponseError, trio.BrokenResourceError):
            pass
        except (ValueError, IndexError) as exc:
            every[0].problem = f"answers that are not HTTP: {exc}"
        for seen in every:
            if seen.fate is None:
                self._end(seen, Fate.NOTHING)

    def _begin(self, ask: AskPlan) -> Seen:
        first = self._raw is None
        seen = Seen(ask.id, ask, trio.current_time(), first_on_connection=first)
        self.seen.append(seen)
        self._note(f"asks {ask.id} {_in_words(ask)}")
        return seen

    def _connect(self, seen: Seen) -> RawClient | None:
        if self._raw is None or self._wire.is_over():
            self._close()
            seen.first_on_connection = True
            try:
                self._wire = self.knock()
            except OSError:
                self._end(seen, Fate.UNREACHED)
                return None
            self._raw = RawClient(self._wire)
        return self._raw

    async def _send(self, raw: RawClient, seen: Seen) -> bool:
        """False when the client has left."""
        ask, data = seen.plan, _encode(seen.plan)
        match ask.habit:
            case Habit.LEAVES_IN_BODY:
                await raw.send(data[:-5])
                await trio.sleep(ask.after)
                self._end(seen, Fate.LEFT)
                return False
            case Habit.WRITES_SLOWLY:
                piece = max(1, len(data) // 4)
                for at in range(0, len(data), piece):
                    if at:
                        await trio.sleep(ask.after / 4)
                    try:
                        await raw.send(data[at : at + piece])
                    except trio.BrokenResourceError:
                        return True  # it was too slow, and there may be an answer that says so
            case _:
                await raw.send(data)
        seen.sent = trio.current_time()
        return True

    async def _read(self, raw: RawClient, seen: Seen) -> None:
        ask = seen.plan
        head = await raw.read_head()
        seen.response = head
        self._note(f"gets {head.status} for {seen.id}")
        body = bytearray()
        if ask.habit is Habit.STOPS_READING:
            await self._dawdle(seen, ask.after * 2)
        while piece := await raw.read_piece():
            body += piece
            seen.response = attrs.evolve(head, body=bytes(body))
            if ask.habit is Habit.LEAVES_AT_FIRST and head.status == 200:
                self._end(seen, Fate.LEFT)
                return
            if ask.habit is Habit.READS_SLOWLY:
                await self._dawdle(seen, ask.after / 10)
        complete = raw.complete
        seen.response = attrs.evolve(head, body=bytes(body), complete=complete)
        if not complete:
            self._end(seen, Fate.CUT)
        else:
            self._end(seen, Fate.ANSWERED if head.status < 400 else Fate.REFUSED)

    async def _dawdle(self, seen: Seen, seconds: float) -> None:
        seen.dawdled += seconds
        await trio.sleep(seconds)

    def _end(self, seen: Seen, fate: Fate) -> None:
        seen.fate, seen.ended = fate, trio.current_time()
        self._note(f"{seen.id}: {fate.value}")

    def _close(self) -> None:
        if self._raw is not None:
            self._wire.close()
            self._raw = None


def _again(ask: AskPlan, number: int) -> AskPlan:
    """The same once more, as another request."""
    name = f"{ask.id}.{number}"
    body = orjson.loads(
        orjson.dumps(ask.body).replace(f"say {ask.id};".encode(), f"say {name};".encode())
    )
    return attrs.evolve(ask, id=name, body=body, habit=Habit.PATIENT)


def _is_last(response: RawResponse | None) -> bool:
    return response is not None and response.header("connection") == "close"


def _encode(ask: AskPlan) -> bytes:
    body = orjson.dumps(ask.body)
    match ask.habit:
        case Habit.BAD_JSON:
            body = body[:-3]
        case Habit.TOO_LARGE:
            body = body[:-1] + b', "padding": "' + b"x" * 5000 + b'"}'
    headers = [("x-request-id", ask.id), ("content-type", "application/json")]
    if ask.timeout is not None:
        headers.append(("x-citadel-timeout", str(ask.timeout)))
    if ask.key is not None:
        headers.append(("authorization", f"Bearer {ask.key}"))
    return http_request("POST", ask.path, None, headers, body=body)


def _in_words(ask: AskPlan) -> str:
    kind = "a stream" if ask.stream else "an answer"
    habit = "" if ask.habit is Habit.PATIENT else f"; {ask.habit.value} ({ask.after:g} s)"
    return f"of {ask.body.get('model')} for {kind} at {ask.path}{habit}"
