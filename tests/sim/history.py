"""What happened in a run, in order: printed for people, and compared to prove that it repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import attrs
import trio

_TRIO = str(Path(trio.__file__).parent)


@attrs.define(eq=False)
class History:
    """Lines of virtual time, who, and what."""

    _lines: list[tuple[float, str, str]] = attrs.field(factory=list, init=False)

    def note(self, who: str, what: str) -> None:
        self._lines.append((trio.current_time(), who, what))

    def __len__(self) -> int:
        return len(self._lines)

    def lines(self) -> Iterable[str]:
        for at, who, what in self._lines:
            yield f"{at:12.6f}  {who:<12} {what}"

    def digest(self) -> str:
        """The same for two runs in which the same happened at the same times."""
        found = hashlib.sha256()
        for line in self._lines:
            found.update(repr(line).encode())
        return found.hexdigest()


def task_tree() -> str:
    """Every task of this event loop, and the innermost function that it waits in, but Trio's."""
    lines: list[str] = []

    def add(task: trio.lowlevel.Task, depth: int) -> None:
        place = ""
        for frame, line in task.iter_await_frames():
            if not frame.f_code.co_filename.startswith(_TRIO):
                place = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{line})"
        lines.append(f"{'  ' * depth}{task.name}: {place}")
        for nursery in task.child_nurseries:
            for child in sorted(nursery.child_tasks, key=lambda t: t.name):
                add(child, depth + 1)

    root = trio.lowlevel.current_root_task()
    if root is not None:
        add(root, 0)
    return "\n".join(lines)
