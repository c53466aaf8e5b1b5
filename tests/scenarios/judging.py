"""How well a gateway came through a scenario, by what its clients and its engines saw."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import attrs

from tests.scenarios.client import End, Told


@enum.unique
class Grade(enum.IntEnum):
    """From good to bad."""

    PASS = 0  # all that the scenario asks for
    PARTIAL = 1  # the right answer, but late, too dear, or with something to stumble over
    SAFE = 2  # no answer, and the client was told so in time
    FAIL = 3  # a part passed off as the whole, a wrong text, no end, or an engine left to work

    @property
    def word(self) -> str:
        return self.name.lower()


@attrs.frozen
class Verdict:
    """:param why: what kept it from a better grade; empty for a pass.
    :param note: a figure that is worth telling, whatever the grade.
    """

    grade: Grade
    why: str = ""
    note: str = ""

    def unless(self, holds: bool, why: str, grade: Grade = Grade.PARTIAL) -> Verdict:
        """This verdict if something *holds*, else one that is *grade* at best.

        Of what is not as bad as what is known already, nothing is said.
        """
        if holds or grade < self.grade:
            return self
        reasons = [self.why, why] if grade is self.grade else [why]
        return Verdict(grade, "; ".join(filter(None, reasons)), self.note)

    def noting(self, note: str) -> Verdict:
        return attrs.evolve(self, note=note)


PASS = Verdict(Grade.PASS)


def served(told: Told) -> Verdict:
    """The client should have had the whole answer."""
    match told.end:
        case End.WHOLE:
            return PASS
        case End.REFUSED:
            return Verdict(Grade.SAFE, f"status {told.status}{_named(told)}")
        case End.BROKEN if told.status is None:
            return Verdict(Grade.SAFE, "the connection ended without an answer")
        case End.BROKEN if told.error is not None:
            return Verdict(Grade.SAFE, f"an error after {_words(told)}{_named(told)}")
        case End.BROKEN:
            return Verdict(Grade.SAFE, f"cut after {_words(told)}")
        case End.TRUNCATED:
            return Verdict(Grade.FAIL, f"{_words(told)} passed off as the whole answer")
        case End.WRONG:
            return Verdict(Grade.FAIL, "a text that is not the answer")
        case End.SILENT:
            return Verdict(Grade.FAIL, f"no end within {told.seconds:.1f} s")
        case End.LEFT:
            raise ValueError("a client that left is not served")


def refused(told: Told) -> Verdict:
    """The client should have been told that there is no answer, and soon."""
    match told.end:
        case End.REFUSED:
            return PASS
        case End.BROKEN:
            return Verdict(Grade.PARTIAL, "no error status")
        case End.SILENT:
            return Verdict(Grade.FAIL, f"no end within {told.seconds:.1f} s")
        case _:
            return Verdict(Grade.FAIL, "an answer that nobody gave")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of *verdicts*, with the reasons of all that are as bad, each once."""
    found = list(verdicts) or [Verdict(Grade.FAIL, "not played")]
    grade = max(verdict.grade for verdict in found)
    reasons = [verdict.why for verdict in found if verdict.grade is grade and verdict.why]
    notes = [verdict.note for verdict in found if verdict.note]
    return Verdict(grade, "; ".join(dict.fromkeys(reasons)), "; ".join(dict.fromkeys(notes)))


def _named(told: Told) -> str:
    return f" ({told.code})" if told.code else ""


def _words(told: Told) -> str:
    return f"{len(told.text.split())} of 60 words"
