"""The notify protocol, spoken to a real datagram socket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.io.systemd import Notifier, feed_watchdog


class Manager:
    """The service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.setblocking(False)

    def heard(self) -> list[str]:
        """Every datagram since the last call."""
        messages = []
        while True:
            try:
                messages.append(self.sock.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(path: str) -> Iterator[Manager]:
    manager = Manager(path)
    with manager.sock:
        yield manager


def test_each_message_is_one_datagram(manager: Manager, path: str) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": path})

    notifier.ready()
    notifier.status("4 models, 0 requests")
    notifier.watchdog()
    notifier.stopping()

    expected = ["READY=1", "STATUS=4 models, 0 requests", "WATCHDOG=1", "STOPPING=1"]
    assert manager.heard() == expected


def test_a_leading_at_sign_means_the_abstract_namespace() -> None:
    name = f"citadel-test-{os.getpid()}"
    manager = Manager("\0" + name)

    with manager.sock:
        Notifier.from_environ({"NOTIFY_SOCKET": "@" + name}).ready()

        assert manager.heard() == ["READY=1"]


def test_a_line_break_in_the_status_cannot_smuggle_in_a_message(
    manager: Manager, path: str
) -> None:
    Notifier.from_environ({"NOTIFY_SOCKET": path}).status("draining\nREADY=1\r\n")

    assert manager.heard() == ["STATUS=draining READY=1"]


def test_a_status_that_is_not_valid_unicode_is_still_sent(manager: Manager, path: str) -> None:
    Notifier.from_environ({"NOTIFY_SOCKET": path}).status("model \udcff")

    assert manager.heard() == ["STATUS=model ?"]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_a_manager_nothing_is_said_or_logged(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier.from_environ({**environ, "WATCHDOG_USEC": "30000000"})

    notifier.ready()
    notifier.status("up")
    notifier.watchdog()
    notifier.stopping()

    assert notifier == Notifier()
    assert not caplog.records


def test_an_address_of_another_kind_is_reported_and_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": "vsock:2:1234"})

    assert notifier == Notifier()
    assert "vsock:2:1234" in caplog.text


@pytest.mark.parametrize("name", ["/nowhere/notify", "/" + "x" * 200, "/with\0nul"])
def test_a_failing_send_is_logged_and_never_raises(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    Notifier.from_environ({"NOTIFY_SOCKET": name}).ready()

    assert "cannot notify the service manager" in caplog.text


def test_a_manager_that_stopped_reading_costs_a_moment_and_never_raises(
    manager: Manager, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as chatty:
        chatty.connect(path)
        chatty.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                chatty.send(b"STATUS=filling the queue")

    Notifier.from_environ({"NOTIFY_SOCKET": path}).watchdog()

    assert "cannot notify the service manager" in caplog.text


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "me"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_the_manager_asks_of_this_process(
    environ: dict[str, str], interval: float | None
) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": "/run/notify", **environ})

    assert notifier.watchdog_interval == interval


async def test_pings_come_at_once_and_then_at_every_interval(
    manager: Manager, path: str, mock_clock: MockClock
) -> None:
    notifier = Notifier(path, 15.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: feed_watchdog(notifier, alive=lambda: True))

        await wait_all_tasks_blocked()
        assert manager.heard() == ["WATCHDOG=1"]

        mock_clock.jump(14.9)
        await wait_all_tasks_blocked()
        assert manager.heard() == []

        mock_clock.jump(0.1)
        await wait_all_tasks_blocked()
        assert manager.heard() == ["WATCHDOG=1"]

        nursery.cancel_scope.cancel()


async def test_a_gateway_that_is_not_alive_goes_unfed_until_it_recovers(
    manager: Manager, path: str, mock_clock: MockClock
) -> None:
    notifier = Notifier(path, 15.0)
    answers = iter([True, False, False, True])
    heard = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: feed_watchdog(notifier, alive=lambda: next(answers)))
        for _ in range(4):
            await wait_all_tasks_blocked()
            heard.append(manager.heard())
            mock_clock.jump(15.0)
        nursery.cancel_scope.cancel()

    assert heard == [["WATCHDOG=1"], [], [], ["WATCHDOG=1"]]


async def test_feeding_ends_at_once_when_no_watchdog_watches(manager: Manager, path: str) -> None:
    await feed_watchdog(Notifier(path), alive=lambda: True)

    assert manager.heard() == []
