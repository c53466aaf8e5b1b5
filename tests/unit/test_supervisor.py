from __future__ import annotations

from functools import partial

import pytest
import trio

from citadel_gateway.io.supervisor import BackgroundTaskDied, RestartPolicy, supervise

POLICY = RestartPolicy(pause=1, pause_max=4, stable_after=60, give_up_after=5)


class Task:
    """Runs for the times that it was given, one after the other, and then raises."""

    def __init__(self, *lives: float) -> None:
        self.lives = list(lives)
        self.began: list[float] = []
        self.crashes: list[tuple[str, str]] = []

    async def run(self) -> None:
        self.began.append(trio.current_time())
        if not self.lives:
            await trio.sleep_forever()
        await trio.sleep(self.lives.pop(0))
        raise OSError("broken")

    def note(self, name: str, exc: Exception) -> None:
        self.crashes.append((name, str(exc)))

    async def supervised(self) -> None:
        await supervise(self.run, name="task", on_crash=self.note, policy=POLICY)


async def test_a_task_that_raises_is_started_again_after_growing_pauses(
    autojump_clock: object,
) -> None:
    task = Task(0, 0, 0, 0)
    with trio.move_on_after(1000):
        await task.supervised()

    assert task.began == [0, 1, 3, 7, 11]  # pauses of 1, 2, 4 and, at most, 4 again
    assert task.crashes == [("task", "broken")] * 4


async def test_a_task_that_keeps_raising_is_given_up(autojump_clock: object) -> None:
    task = Task(0, 0, 0, 0, 0)
    with pytest.raises(BackgroundTaskDied, match="task crashed 5 times in a row") as caught:
        await task.supervised()

    assert isinstance(caught.value.__cause__, OSError)
    assert (len(task.crashes), trio.current_time()) == (5, 11)


async def test_crashes_are_forgiven_when_the_task_ran_well_in_between(
    autojump_clock: object,
) -> None:
    task = Task(0, 0, 0, 60, 0, 0, 0)
    with trio.move_on_after(1000):
        await task.supervised()

    assert task.began == [0, 1, 3, 7, 68, 70, 74, 78]


async def test_a_task_that_returns_has_crashed(autojump_clock: object) -> None:
    task = Task()
    policy = RestartPolicy(give_up_after=1)
    with pytest.raises(BackgroundTaskDied):
        await supervise(trio.lowlevel.checkpoint, name="task", on_crash=task.note, policy=policy)

    assert task.crashes == [("task", "task returned; background tasks should not")]


async def test_an_exception_from_the_task_s_nursery_is_a_crash(autojump_clock: object) -> None:
    task = Task()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise OSError("broken")

    with pytest.raises(BackgroundTaskDied):
        await supervise(run, name="task", on_crash=task.note, policy=RestartPolicy(give_up_after=2))

    assert len(task.crashes) == 2


async def test_the_end_of_the_service_is_no_crash(autojump_clock: object) -> None:
    task = Task()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(supervise, task.run, name="task", on_crash=task.note))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()

    assert (task.began, task.crashes) == ([0], [])
