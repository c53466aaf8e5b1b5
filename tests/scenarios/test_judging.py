"""The judges themselves: what is no pass must not be called one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.scenarios.client import End, Told
from tests.scenarios.gateways import DIRECT, REFERENCE
from tests.scenarios.judging import PASS, Grade, Verdict, refused, served, worst
from tests.scenarios.runner import run
from tests.scenarios.scenario import SCENARIOS
from tests.scenarios.speech import TEXT, WORDS, Heard, is_cut, speaks, takes_no_prefill
from tests.support.scripted_engine import Script, Send


def event(text: str = "", finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return json.dumps({"model": "m", "choices": [choice]})


END = event(finish="stop")
DONE = "[DONE]"
ERROR = json.dumps({"error": {"message": "it broke", "code": "broken"}})
FORTY = [event(word) for word in WORDS[:40]]
REST = [event(word) for word in WORDS[40:]]


def told(events: list[str], **fields: Any) -> Told:
    """What a client makes of a stream of *events* that comes to its own end."""
    found = Told(began=0.0, status=200, complete=True)
    for number, data in enumerate(events):
        found.read_event(data, float(number))
    for name, value in fields.items():
        setattr(found, name, value)
    return found


STREAMS = [
    pytest.param(told([*FORTY, *REST, END, DONE]), End.WHOLE, Grade.PASS, id="whole"),
    pytest.param(told([*FORTY, *REST, END]), End.WHOLE, Grade.PASS, id="no done"),
    pytest.param(told([*FORTY, ERROR]), End.BROKEN, Grade.SAFE, id="error"),
    pytest.param(told([*FORTY, ERROR, DONE]), End.BROKEN, Grade.SAFE, id="error and done"),
    pytest.param(told(FORTY, complete=False), End.BROKEN, Grade.SAFE, id="cut"),
    pytest.param(told([], complete=False, status=None), End.BROKEN, Grade.SAFE, id="no head"),
    pytest.param(told([], status=503), End.REFUSED, Grade.SAFE, id="refused"),
    pytest.param(told(FORTY), End.TRUNCATED, Grade.FAIL, id="ends tidily"),
    pytest.param(told([*FORTY, DONE]), End.TRUNCATED, Grade.FAIL, id="a false done"),
    pytest.param(told([*FORTY, END, DONE]), End.TRUNCATED, Grade.FAIL, id="a false end"),
    pytest.param(told([*FORTY, *REST, DONE]), End.TRUNCATED, Grade.FAIL, id="no finish_reason"),
    pytest.param(told([]), End.TRUNCATED, Grade.FAIL, id="nothing"),
    pytest.param(told([*FORTY, *FORTY, *REST, END, DONE]), End.WRONG, Grade.FAIL, id="said twice"),
    pytest.param(told([*FORTY, *REST[1:], END, DONE]), End.WRONG, Grade.FAIL, id="a word missing"),
    pytest.param(told([*REST, ERROR]), End.WRONG, Grade.FAIL, id="another text, and an error"),
    pytest.param(told(FORTY, gave_up=True), End.SILENT, Grade.FAIL, id="no end"),
]


@pytest.mark.parametrize(("seen", "end", "grade"), STREAMS)
def test_only_a_whole_answer_is_whole(seen: Told, end: End, grade: Grade) -> None:
    assert seen.end is end
    assert served(seen).grade is grade


def test_an_event_that_is_no_json_is_noticed() -> None:
    seen = told([*FORTY, '{"choices": [', *REST, END, DONE])

    assert (seen.end, seen.nonsense) == (End.WHOLE, 1)


def test_a_client_notices_how_long_it_was_left_waiting_between_words() -> None:
    seen = Told(began=0.0, status=200)
    for at, word in [(1.0, "a"), (2.0, "b"), (7.0, "c"), (8.0, "d")]:
        seen.read_event(event(word), at)

    assert (seen.first, seen.gap) == (1.0, 5.0)


@pytest.mark.parametrize(
    ("seen", "grade"),
    [
        (told([], status=503), Grade.PASS),
        (told([ERROR]), Grade.PARTIAL),
        (told([*FORTY, *REST, END, DONE]), Grade.FAIL),
        (told([], gave_up=True), Grade.FAIL),
    ],
)
def test_an_outage_wants_to_be_admitted(seen: Told, grade: Grade) -> None:
    assert refused(seen).grade is grade


def test_the_worst_of_several_counts_with_all_its_reasons() -> None:
    found = [PASS, Verdict(Grade.SAFE, "a"), Verdict(Grade.PARTIAL, "b"), Verdict(Grade.SAFE, "c")]

    assert worst(found) == Verdict(Grade.SAFE, "a; c")
    assert worst([PASS, PASS]) == PASS
    assert worst([]).grade is Grade.FAIL


def test_a_lesser_fault_neither_mends_nor_blurs_a_greater_one() -> None:
    cut = Verdict(Grade.SAFE, "cut")

    assert PASS.unless(False, "late") == Verdict(Grade.PARTIAL, "late")
    assert PASS.unless(True, "late") == PASS
    assert cut.unless(False, "late") == cut
    assert cut.unless(False, "hung", Grade.FAIL) == Verdict(Grade.FAIL, "hung")


def heard(*messages: dict[str, str], stream: bool = True) -> Heard:
    asked = {"messages": [{"role": "user", "content": "hi"}, *messages], "stream": stream}
    return Heard(name="m", nth=1, pace=1.0, asked=asked)


def said(script: Script) -> Told:
    """What a client makes of what an engine sends."""
    data = b"".join(step.data for step in script.steps if isinstance(step, Send))
    found = Told(began=0.0, status=200, complete=data.endswith(b"0\r\n\r\n"))
    for line in data.split(b"\n"):
        if line.startswith(b"data: "):
            found.read_event(line.removeprefix(b"data: ").decode(), 0.0)
    return found


@pytest.mark.parametrize("at", [0, 1, 7, len("".join(WORDS[:40])), len(TEXT) - 1])
def test_an_engine_goes_on_where_a_prefill_ends(at: int) -> None:
    rest = said(speaks(heard({"role": "assistant", "content": TEXT[:at]})))

    assert (rest.text, rest.finish, rest.done) == (TEXT[at:], "stop", True)


def test_an_engine_begins_anew_after_a_prefill_that_is_not_the_answers() -> None:
    assert said(speaks(heard({"role": "assistant", "content": "once upon"}))).text == TEXT


def test_a_stream_is_cut_where_the_scenario_says_but_not_if_it_begins_behind_it() -> None:
    forty = "".join(WORDS[:40])
    cut = said(is_cut(40)(heard()))
    continued = said(is_cut(40)(heard({"role": "assistant", "content": forty})))

    assert (cut.text, cut.finish, cut.complete) == (forty, None, False)
    assert (forty + continued.text, continued.complete) == (TEXT, True)


def test_an_engine_may_refuse_a_prefill() -> None:
    refusal = takes_no_prefill(heard({"role": "assistant", "content": WORDS[0]}))

    assert isinstance(refusal.steps[0], Send)
    assert refusal.steps[0].data.startswith(b"HTTP/1.1 400 ")
    assert said(takes_no_prefill(heard())).end is End.WHOLE


def test_without_a_gateway_hardly_anything_passes() -> None:
    """What the scenarios make of a client that asks the faulty engine itself."""
    quick = [name for name in SCENARIOS if name[0] == "S" and name not in {"S06", "S07", "S15"}]

    card = run(DIRECT, only=quick, pace=0.02)

    by_grade = {
        grade: {r.scenario.id for r in card.results if r.verdict.grade is grade} for grade in Grade
    }
    assert by_grade[Grade.PASS] == {"S13"}
    assert by_grade[Grade.PARTIAL] == {"S09", "S10", "S11"}
    assert by_grade[Grade.FAIL] == set()


def test_what_hardly_any_gateway_passes_can_be_passed() -> None:
    hard = ["S05", "S06", "S07", "S08", "S09", "S10", "S11", "S14", "X01", "X02", "X08"]

    card = run(REFERENCE, only=hard, pace=0.05)

    assert {r.scenario.id: r.verdict.why for r in card.results} == dict.fromkeys(hard, "")
    assert {r.verdict.grade for r in card.results} == {Grade.PASS}
