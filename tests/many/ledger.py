"""What clients of many processes were told, with times, and what that says about limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import attrs
import trio

from tests.support.raw_client import Headers, NoResponseError, RawClient
from tests.support.several import ASK, CHAT, HasPort


@attrs.frozen
class Told:
    """One request: it was decided at some time between *began* and *ended*.

    :param status: 0 for no answer.
    """

    key: str
    status: int
    began: float
    ended: float

    @property
    def took(self) -> float:
        return self.ended - self.began


@attrs.define(eq=False)
class Crowd:
    """Clients that ask without end over connections that they keep.

    :param pause: seconds between an answer and the next request.
    """

    clients: int
    pause: float
    keys: Sequence[str] = ("",)
    told: list[Told] = attrs.field(factory=list)

    async def run(self, several: Sequence[HasPort]) -> None:
        """For ever; clients are spread over gateways and keys."""
        async with trio.open_nursery() as nursery:
            for number in range(self.clients):
                gateway = several[number % len(several)]
                key = self.keys[number // len(several) % len(self.keys)]
                nursery.start_soon(self._keep_asking, gateway, key)

    async def _keep_asking(self, gateway: HasPort, key: str) -> None:
        headers: Headers = [("authorization", f"Bearer {key}")] if key else []
        while True:
            began = trio.current_time()
            try:
                async with await RawClient.connect(gateway.port) as client:
                    while True:
                        began = trio.current_time()
                        status = (await client.request("POST", CHAT, ASK, headers)).status
                        self._note(key, status, began)
                        await trio.sleep(self.pause)
            except (OSError, NoResponseError, trio.BrokenResourceError):
                self._note(key, 0, began)
                await trio.sleep(self.pause)

    def _note(self, key: str, status: int, began: float) -> None:
        self.told.append(Told(key, status, began, trio.current_time()))

    def between(self, start: float, end: float = float("inf")) -> list[Told]:
        return [told for told in self.told if start <= told.began and told.ended <= end]


def statuses(told: Iterable[Told]) -> Counter[int]:
    return Counter(each.status for each in told)


def admitted(told: Iterable[Told], key: str | None = None) -> list[Told]:
    return [each for each in told if each.status == 200 and key in (None, each.key)]


def excess(told: Sequence[Told], rate: float, burst: float) -> float:
    """By how many requests a bucket was exceeded in the window, of whatever length, where it was
    exceeded most; negative if never.

    Only what was asked and answered within a window counts as admitted in it, so that this is true
    of whatever happened between.
    """
    most = -burst
    by_end = sorted(told, key=lambda each: each.ended)
    for first in told:
        count = 0
        for each in by_end:
            if each.began >= first.began:
                count += 1
                most = max(most, count - burst - rate * (each.ended - first.began))
    return most


def fill(told: Sequence[Told], rate: float, burst: float) -> float:
    """What part was let through of what a bucket that was full had to give, first to last.

    The one that was next counts as well, as it had not come in yet when the last one was answered.
    """
    span = max(each.ended for each in told) - min(each.began for each in told)
    return (len(told) + 1) / (burst + rate * span)


def quantile(told: Sequence[Told], share: float) -> float:
    """Of the seconds that answers took."""
    took = sorted(each.took for each in told)
    return took[min(len(took) - 1, int(len(took) * share))]
