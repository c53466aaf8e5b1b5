from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.io.logs import JsonLog, LogHandler, redact


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read(descriptor: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in os.read(descriptor, 2**20).splitlines()]


def test_a_line_is_an_object_with_its_time_in_front(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1])
    log.event(logging.WARNING, "breaker", endpoint="http://a", before="closed")
    log.flush_now()

    (line,) = read(pipe[0])
    assert list(line) == ["ts", "level", "event", "endpoint", "before"]
    assert (line["level"], line["event"]) == ("warning", "breaker")
    assert line["ts"].endswith("+00:00")


def test_lines_below_the_level_are_not_written(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1], level=logging.WARNING)
    log.event(logging.INFO, "quiet")
    log.event(logging.ERROR, "loud")
    log.flush_now()

    assert [line["event"] for line in read(pipe[0])] == ["loud"]


def test_what_json_cannot_say_is_written_all_the_same(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1])
    log.write({"event": "odd", "text": "\ud800", "big": 2**70, "object": ValueError("no")})
    log.flush_now()

    (line,) = read(pipe[0])
    assert (line["text"], line["big"], line["object"]) == ("\ud800", 2**70, "no")


def test_a_line_break_cannot_forge_a_line(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1])
    log.write({"event": 'a\n{"event": "forged"}'})
    log.flush_now()

    assert len(read(pipe[0])) == 1


def test_beyond_the_limit_lines_are_dropped_and_counted(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1])
    for _ in range(5):
        log.write({"event": "x" * 2**20})

    assert log.dropped == 2


def test_a_closed_pipe_costs_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = JsonLog(writing)
    log.write({"event": "one"})
    log.write({"event": "two"})
    log.flush_now()
    os.close(writing)

    assert log.dropped == 2


async def test_lines_are_written_ten_times_a_second(
    pipe: tuple[int, int], nursery: trio.Nursery
) -> None:
    log = JsonLog(pipe[1])
    nursery.start_soon(log.flush_for_ever)
    log.write({"event": "first"})
    log.write({"event": "second"})
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(pipe[0])

    assert [line["event"] for line in read(pipe[0])] == ["first", "second"]


async def test_nothing_is_waited_for_but_a_line_while_none_comes(
    pipe: tuple[int, int], nursery: trio.Nursery
) -> None:
    log = JsonLog(pipe[1])
    nursery.start_soon(log.flush_for_ever)
    await wait_all_tasks_blocked()

    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf


async def test_a_line_of_another_thread_is_written_though_nothing_else_happens(
    pipe: tuple[int, int], nursery: trio.Nursery
) -> None:
    log = JsonLog(pipe[1])
    nursery.start_soon(log.flush_for_ever)
    await wait_all_tasks_blocked()

    await trio.to_thread.run_sync(log.write, {"event": "from a thread"})

    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(pipe[0])
    assert [line["event"] for line in read(pipe[0])] == ["from a thread"]


async def test_a_line_after_the_end_of_the_event_loop_is_kept_for_the_last_flush(
    pipe: tuple[int, int],
) -> None:
    log = JsonLog(pipe[1])

    async def run() -> None:
        with trio.move_on_after(0.01):
            await log.flush_for_ever()

    await trio.to_thread.run_sync(trio.run, run)
    log.write({"event": "last"})
    log.flush_now()

    assert [line["event"] for line in read(pipe[0])] == ["last"]


async def test_a_pipe_that_nobody_reads_delays_nobody(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1])
    log.write({"event": "x" * 2**20})  # far more than a pipe holds
    with trio.fail_after(5):
        with trio.move_on_after(0.05) as patience:
            await log.flush()
        log.write({"event": "last"})
        await trio.to_thread.run_sync(log.flush_now)

    assert patience.cancelled_caught
    lines = 0
    while lines < 2:  # lets the threads go, which would go on writing to whatever has this number
        lines += os.read(pipe[0], 2**20).count(b"\n")


def test_records_of_libraries_become_lines_without_secrets(pipe: tuple[int, int]) -> None:
    log = JsonLog(pipe[1])
    logger = logging.getLogger("a library")
    logger.propagate = False
    logger.handlers = [LogHandler(log)]
    logger.warning("sent %s", "Authorization: Bearer abc.def")
    try:
        raise ValueError("bad key sk-cit-0123456789")
    except ValueError:
        logger.exception("failed")
    log.flush_now()

    warning, error = read(pipe[0])
    assert (warning["logger"], warning["level"]) == ("a library", "warning")
    assert warning["event"] == "sent Authorization: [redacted]"
    assert "ValueError: bad key [redacted]" in error["exception"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("sk-cit-abcdef_123", "[redacted]"),
        ("key=sk-abcdef, next", "key=[redacted], next"),
        ("bearer  xyz end", "[redacted] end"),
        ("a task-list and sk-1", "a task-list and sk-1"),
        ("nothing here", "nothing here"),
    ],
)
def test_credentials_are_redacted(text: str, clean: str) -> None:
    assert redact(text) == clean
