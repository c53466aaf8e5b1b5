"""Sockets that listen: passed on to us, found by name or by address, and closed without a loss."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from citadel_gateway.io.listening import (
    API,
    HANDED_OVER_BY,
    MONITORING_LISTENER,
    Inherited,
    Passed,
    inherited_sockets,
    refuse_newcomers,
)

REPORT = """
import os, sys
for place, descriptor in enumerate(map(int, sys.argv[3:])):
    os.dup2(descriptor, 100 + place)
for place in range(len(sys.argv) - 3):
    os.dup2(100 + place, 3 + place)
os.environ[sys.argv[1]] = str(os.getpid() if sys.argv[2] == "me" else sys.argv[2])
from citadel_gateway.io.listening import inherited_sockets
for each in inherited_sockets(os.environ):
    print(each, os.get_inheritable(each.socket.fileno()))
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def report(
    sockets: list[socket.socket], *, who: tuple[str, str] = ("LISTEN_PID", "me"), **environ: str
) -> list[str]:
    """What a process finds that *sockets* were passed on to."""
    descriptors = [sock.fileno() for sock in sockets]
    done = subprocess.run(
        [sys.executable, "-c", REPORT, *who, *map(str, descriptors)],
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), **environ},
        pass_fds=descriptors, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return (done.stdout + done.stderr).splitlines()


def test_sockets_are_found_by_the_protocol_and_kept_from_children(
    listener: socket.socket,
) -> None:
    port = listener.getsockname()[1]

    assert report([listener], LISTEN_FDNAMES="api") == [f"127.0.0.1:{port} (api) False"]
    assert report([listener, listener], LISTEN_FDNAMES="api:monitoring") == [
        f"127.0.0.1:{port} (api) False",
        f"127.0.0.1:{port} (monitoring) False",
    ]
    assert report([listener]) == [f"127.0.0.1:{port} False"]


def test_a_process_that_hands_over_says_who_it_is(listener: socket.socket) -> None:
    found = report([listener], who=(HANDED_OVER_BY, str(os.getpid())), LISTEN_FDNAMES="api")

    assert len(found) == 1


@pytest.mark.parametrize("who", [("LISTEN_PID", "1"), ("LISTEN_PID", "x"), (HANDED_OVER_BY, "1")])
def test_what_was_meant_for_another_process_is_let_be(
    who: tuple[str, str], listener: socket.socket
) -> None:
    assert report([listener], who=who) == []


def test_what_does_not_listen_is_reported_and_let_be(listener: socket.socket) -> None:
    with socket.socket() as idle, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        found = report([idle, listener, datagrams])

    port = listener.getsockname()[1]
    assert found == [
        f"127.0.0.1:{port} False",
        "descriptor 3 is no TCP socket that listens: not used",
        "descriptor 5 is no TCP socket that listens: not used",
    ]


def test_without_a_manager_there_is_nothing() -> None:
    assert inherited_sockets({}) == []
    assert inherited_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == []


def test_a_name_counts_more_than_an_address(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as second:
        passed = Passed([Inherited("", listener), Inherited(API, second)])

        assert passed.take(API, "127.0.0.1", port) is second
        assert passed.take(API, "127.0.0.1", port) is listener


def test_an_address_must_be_the_same(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    passed = Passed([Inherited("citadel.socket", listener)])

    assert passed.take(API, "0.0.0.0", port) is None
    assert passed.take(API, "127.0.0.1", port + 1) is None
    assert passed.take(MONITORING_LISTENER, "localhost", port) is listener


def test_what_nobody_takes_is_named_and_closed(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    passed = Passed([Inherited("other", listener)])

    assert passed.close_rest() == [f"127.0.0.1:{port} (other)"]
    assert listener.fileno() == -1


def test_a_listener_that_refuses_newcomers_still_has_those_who_came(
    listener: socket.socket,
) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as early, socket.socket() as late:
        assert refuse_newcomers(listener)
        late.setblocking(False)
        late.connect_ex(("127.0.0.1", port))
        listener.setblocking(False)
        accepted, _ = listener.accept()
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()
        early.sendall(b"hello")
        with accepted:
            accepted.settimeout(5)

            assert accepted.recv(10) == b"hello"
