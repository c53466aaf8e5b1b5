"""Keeps background tasks alive, or takes the process down with a clear message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn

import attrs
import trio


class BackgroundTaskDied(Exception):
    """A background task could not be kept alive; the service manager should start us again."""


@attrs.frozen(kw_only=True)
class RestartPolicy:
    """Pauses double from *pause* to *pause_max* seconds; *stable_after* of them are forgiving."""

    pause: float = 0.5
    pause_max: float = 30.0
    stable_after: float = 60.0
    give_up_after: int = 5


async def supervise(
    task: Callable[[], Awaitable[object]],
    *,
    name: str,
    on_crash: Callable[[str, Exception], None],
    policy: RestartPolicy | None = None,
) -> NoReturn:
    """Run *task* for ever; start it again, with back-off, when it raises.

    Only ``Exception`` is caught: ``trio.Cancelled`` is a ``BaseException``, and a group that holds
    one is a ``BaseExceptionGroup``, so the end of the service always gets through.
    """
    policy = policy or RestartPolicy()
    crashes = 0
    while True:
        started = trio.current_time()
        try:
            await task()
            raise RuntimeError(f"{name} returned; background tasks should not")
        except Exception as exc:
            if trio.current_time() - started >= policy.stable_after:
                crashes = 0
            crashes += 1
            on_crash(name, exc)
            if crashes >= policy.give_up_after:
                raise BackgroundTaskDied(f"{name} crashed {crashes} times in a row") from exc
        await trio.sleep(min(policy.pause * 2 ** (crashes - 1), policy.pause_max))
