"""When a gateway of several workers counts as well, and who is killed for being silent."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.app.supervisor import Supervisor
from citadel_gateway.app.workers import State, Worker
from citadel_gateway.io.channel import Channel
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.systemd import Notifier


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    file = tmp_path / "gateway.yaml"
    file.write_text("models: {m: {endpoint: 'http://127.0.0.1:1'}}\nservice: {workers: 2}\n")
    found = ConfigFile(str(file))
    return Supervisor(found.load(), found, [], Notifier())


class Recorded(Worker):
    """No process; it remembers what it was sent."""

    got: list[signal.Signals]

    def signal(self, number: signal.Signals) -> None:
        self.got.append(number)


def add(supervisor: Supervisor, number: int, state: State) -> Recorded:
    async def answer(what: str, body: object) -> None:
        raise AssertionError("nobody asks")

    ours, theirs = socket.socketpair()
    theirs.close()
    worker = Recorded(
        number=number, place=number, pid=0, generation=1, began=trio.current_time(), state=state,
        channel=Channel(ours, lambda *_: None, answer),
    )  # fmt: skip
    worker.got = []
    supervisor._workers.append(worker)
    return worker


async def test_it_is_well_while_all_answer(
    supervisor: Supervisor, autojump_clock: MockClock
) -> None:
    workers = [add(supervisor, number, State.READY) for number in (1, 2)]
    looks = []
    for second in range(0, 15, 5):
        looks.append(supervisor.is_well())
        await trio.sleep(5)
        workers[0].heard_at = trio.current_time()
        del second
    looks.append(supervisor.is_well())
    workers[1].heard_at = trio.current_time()
    looks.append(supervisor.is_well())
    for worker in workers:
        worker.channel.sock.close()

    assert looks == [True, True, True, False, True]


async def test_one_that_starts_is_waited_for_if_another_one_serves(
    supervisor: Supervisor, autojump_clock: MockClock
) -> None:
    starting = add(supervisor, 1, State.STARTING)
    alone = supervisor.is_well()
    ready = add(supervisor, 2, State.READY)
    await trio.sleep(30)
    ready.heard_at = trio.current_time()
    both = supervisor.is_well()
    for worker in (starting, ready):
        worker.channel.sock.close()

    assert (alone, both) == (False, True)


async def test_a_silent_worker_is_killed_and_one_that_speaks_is_not(
    supervisor: Supervisor, autojump_clock: MockClock
) -> None:
    silent, speaks = (add(supervisor, number, State.READY) for number in (1, 2))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor._look_after_them)
        while not silent.got:
            await trio.sleep(1)
            speaks.heard_at = trio.current_time()
        nursery.cancel_scope.cancel()
    for worker in (silent, speaks):
        worker.channel.sock.close()

    assert (silent.got, speaks.got) == ([signal.SIGKILL], [])
    assert 20 < trio.current_time() - began <= 22
