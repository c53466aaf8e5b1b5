"""What a run has found, and how to see it again."""

from __future__ import annotations

import time
from collections import Counter

import attrs

MOST_KEPT = 60


@attrs.frozen
class Violation:
    phase: str
    case: str
    why: str
    sent: bytes = b""
    received: bytes = b""

    def __str__(self) -> str:
        lines = [f"[{self.phase}] {self.case}", f"    {self.why}"]
        if self.sent:
            lines.append(f"    sent     {_short(self.sent)}")
        if self.received:
            lines.append(f"    received {_short(self.received)}")
        return "\n".join(lines)


def _short(data: bytes) -> str:
    return repr(data) if len(data) <= 1500 else f"{data[:1400]!r} ... ({len(data)} bytes)"


@attrs.define(eq=False)
class Report:
    seed: int
    violations: list[Violation] = attrs.field(factory=list)
    counts: Counter[str] = attrs.field(factory=Counter)
    lines: list[str] = attrs.field(factory=list)
    phase: str = "start"
    aloud: bool = False
    _began: float = attrs.field(factory=time.monotonic)

    def found(self, case: str, why: str, sent: bytes = b"", received: bytes = b"") -> None:
        self.counts["violations"] += 1
        if len(self.violations) < MOST_KEPT:
            violation = Violation(self.phase, case, why, sent, received)
            self.violations.append(violation)
            self._say(f"VIOLATION {violation}")

    def note(self, line: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {line}"
        self.lines.append(line)
        self._say(line)

    def count(self, what: str, by: int = 1) -> None:
        self.counts[f"{self.phase}: {what}"] += by

    def _say(self, text: str) -> None:
        if self.aloud:
            print(text, flush=True)  # noqa: T201  # a program's output

    @property
    def summary(self) -> str:
        counts = [f"{n:9d}  {what}" for what, n in sorted(self.counts.items())]
        short = [f"  [{v.phase}] {v.case}: {v.why[:200]}" for v in self.violations]
        found = self.counts["violations"]
        verdict = f"seed {self.seed}: {found} violations" if found else f"seed {self.seed}: clean"
        return "\n".join([*counts, verdict, *short])

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(str, self.violations)])

    def assert_clean(self) -> None:
        assert not self.violations, f"\n{self}"
