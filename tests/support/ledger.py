"""What the clients saw, to be held against what the engines and the metrics say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

import attrs
from prometheus_client.parser import text_string_to_metric_families

from tests.support.raw_client import RawResponse
from tests.support.scripted_engine import LedgerEntry

Outcome = Literal["answered", "refused", "failed", "cut", "left"]
Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]


@attrs.frozen(kw_only=True)
class Seen:
    """The end of one request, as its client saw it.

    answered: a whole response below 400. refused: a whole one from 400 on. failed: a stream that
    ended with an error event. cut: the server hung up. left: the client did.
    """

    request_id: str
    status: int | None
    outcome: Outcome
    tokens: tuple[str, ...] = ()
    complete: bool = False


@attrs.define(eq=False)
class ClientLedger:
    asked: set[str] = attrs.field(factory=set)
    seen: dict[str, list[Seen]] = attrs.field(factory=lambda: defaultdict(list))

    def ask(self, request_id: str) -> None:
        self.asked.add(request_id)

    def saw(
        self,
        request_id: str,
        response: RawResponse | None,
        tokens: Iterable[str] = (),
        *,
        failed: bool = False,
    ) -> Seen:
        """The request is over. No response at all counts as cut."""
        return self._add(
            Seen(
                request_id=request_id,
                status=response.status if response else None,
                outcome="failed" if failed else _outcome(response),
                tokens=tuple(tokens),
                complete=response is not None and response.complete,
            )
        )

    def left(self, request_id: str, status: int | None = None, tokens: Iterable[str] = ()) -> Seen:
        """The client hung up, after the head when there is a status."""
        return self._add(
            Seen(request_id=request_id, status=status, outcome="left", tokens=tuple(tokens))
        )

    def outcomes(self) -> Counter[Outcome]:
        return Counter(seen.outcome for ends in self.seen.values() for seen in ends)

    def discrepancies(self, executed: Iterable[LedgerEntry], *, attempts: int = 1) -> list[str]:
        """What does not balance, in words; nothing when all is well.

        Every request ends exactly once, nothing is executed that nobody asked for, nothing more
        often than `attempts`, and whatever a client got an engine gave.
        """
        runs: dict[str, list[LedgerEntry]] = defaultdict(list)
        for entry in executed:
            runs[entry.request_id].append(entry)
        known = self.asked | self.seen.keys() | runs.keys()
        return [
            complaint
            for request_id in sorted(known)
            for complaint in self._complaints(request_id, runs.get(request_id, []), attempts)
        ]

    def _complaints(self, request_id: str, runs: list[LedgerEntry], attempts: int) -> Iterable[str]:
        ends = self.seen.get(request_id, [])
        if request_id not in self.asked:
            yield f"{request_id}: nobody asked for it"
        elif len(ends) != 1:
            yield f"{request_id}: {len(ends)} ends"
        if len(runs) > attempts:
            yield f"{request_id}: executed {len(runs)} times"
        answered = any(run.ended == "answered" for run in runs)
        if any(seen.outcome == "answered" for seen in ends) and not answered:
            yield f"{request_id}: answered by nobody"

    def _add(self, seen: Seen) -> Seen:
        self.seen[seen.request_id].append(seen)
        return seen


def parse_metrics(text: str) -> Metrics:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum over every label set that has these labels; 0 where there is none."""
    wanted = labels.items()
    return sum(
        value for (key, having), value in metrics.items() if key == name and wanted <= having
    )


def _outcome(response: RawResponse | None) -> Outcome:
    if response is None or not response.complete:
        return "cut"
    return "answered" if response.status < 400 else "refused"
