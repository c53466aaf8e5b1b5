"""Sums of pages never fall, whoever comes, goes or begins again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from citadel_gateway.wire.exposition import HostPage, parse_page
from tests.support.gateway import fleet, running_gateway
from tests.support.ledger import parse_metrics, total

COUNTER = "citadel_gateway_requests_total"


def page(count: float | None = None, endpoint: str = "http://a", **gauges: float) -> str:
    text = ""
    if count is not None:
        text += f"# HELP {COUNTER} Requests.\n# TYPE {COUNTER} counter\n"
        text += f'{COUNTER}{{endpoint="{endpoint}",model="m"}} {count}\n'
    for name, value in gauges.items():
        full = f"citadel_gateway_{name}"
        text += f"# HELP {full} A level.\n# TYPE {full} gauge\n{full} {value}\n"
    return text


def value(host: HostPage, name: str = COUNTER) -> float:
    return total(parse_metrics("".join(host.pieces())), name)


def test_counters_of_those_that_live_and_those_that_have_gone_add_up() -> None:
    host = HostPage()
    host.take(1, page(3))
    host.take(2, page(4))
    host.leave(1)
    host.take(3, page(5))

    assert value(host) == 12


def test_a_worker_that_begins_from_zero_takes_nothing_away() -> None:
    host = HostPage()
    host.take(1, page(7))
    host.take(1, page(2))

    assert value(host) == 9


def test_a_page_that_is_not_whole_leaves_the_rest_as_it_was() -> None:
    host = HostPage()
    host.take(1, page(7, process_open_fds=9))
    host.take(1, page(8), is_whole=False)

    assert value(host) == 8
    assert value(host, "citadel_gateway_process_open_fds") == 9


def test_of_two_pages_that_nobody_read_the_later_one_counts() -> None:
    host = HostPage()
    host.take(1, page(7), is_whole=False)
    host.take(1, page(9), is_whole=False)
    host.leave(1)

    assert value(host) == 9


def test_a_whole_page_takes_the_place_of_one_that_nobody_read() -> None:
    host = HostPage()
    host.take(1, page(7), is_whole=False)
    host.take(1, page(8))

    assert value(host) == 8


def test_a_series_that_a_worker_forgets_stays() -> None:
    host = HostPage()
    host.take(1, page(7))
    host.take(1, page(1, "http://b"))

    assert value(host) == 8


def test_gauges_end_with_their_worker() -> None:
    host = HostPage()
    host.take(1, page(in_flight_requests=3))
    host.take(2, page(in_flight_requests=4))
    before = value(host, "citadel_gateway_in_flight_requests")
    host.leave(1)

    assert (before, value(host, "citadel_gateway_in_flight_requests")) == (7, 4)


def test_what_does_not_add_up_is_shown_at_its_worst() -> None:
    host = HostPage()
    host.take(1, page(endpoint_healthy=1, breaker_state=0, config_generation=4))
    host.take(2, page(endpoint_healthy=0, breaker_state=2, config_generation=4))

    assert value(host, "citadel_gateway_endpoint_healthy") == 0
    assert value(host, "citadel_gateway_breaker_state") == 2
    assert value(host, "citadel_gateway_config_generation") == 4


def test_who_drains_has_requests_and_no_room() -> None:
    host = HostPage()
    host.take(1, page(draining=1, endpoint_limit=10, in_flight=2, endpoint_healthy=0))
    host.take(2, page(draining=0, endpoint_limit=10, in_flight=1, endpoint_healthy=1))

    assert value(host, "citadel_gateway_endpoint_limit") == 10
    assert value(host, "citadel_gateway_in_flight") == 3
    assert value(host, "citadel_gateway_endpoint_healthy") == 1
    assert value(host, "citadel_gateway_draining") == 0


def test_log_lines_that_were_lost_stay_lost() -> None:
    host = HostPage()
    host.take(1, page(log_lines_dropped=5))
    host.leave(1)
    host.take(2, page(log_lines_dropped=0))

    assert value(host, "citadel_gateway_log_lines_dropped") == 5


def test_endpoints_that_nobody_knows_are_forgotten_after_a_while() -> None:
    host = HostPage(remembers=300)
    host.take(1, page(7, "http://gone"))
    host.leave(1)
    host.take(2, page(1, "http://here"))
    seen = []
    for now in (0.0, 299.0, 300.0):
        host.forget_absent(now)
        seen.append(value(host))

    assert seen == [8, 8, 1]


def test_models_that_nobody_knows_are_forgotten_after_a_while() -> None:
    def of(model: str) -> str:
        return (
            "# HELP citadel_gateway_tokens_total Tokens.\n"
            "# TYPE citadel_gateway_tokens_total counter\n"
            f'citadel_gateway_tokens_total{{model="{model}",kind="prompt"}} 3.0\n'
            "# HELP gen_ai_client_token_usage Tokens.\n"
            "# TYPE gen_ai_client_token_usage histogram\n"
            f'gen_ai_client_token_usage_count{{gen_ai_request_model="{model}"}} 1.0\n'
        )

    host = HostPage(remembers=300)
    host.take(1, of("gone"))
    host.leave(1)
    host.take(2, of("here"))
    seen = []
    for now in (0.0, 299.0, 300.0):
        host.forget_absent(now)
        seen.append("".join(host.pieces()).count('model="gone"'))

    assert seen == [2, 2, 0]
    assert "".join(host.pieces()).count('model="here"') == 2


def test_endpoints_that_are_known_are_never_forgotten() -> None:
    host = HostPage(remembers=300)
    host.take(1, page(7))
    host.leave(1)
    host.take(2, page(1))
    for now in (0.0, 300.0, 900.0):
        host.forget_absent(now)

    assert value(host) == 8


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["counts", "dies", "forgets"])), max_size=40
    )
)
def test_no_sum_ever_falls_and_what_was_said_is_in_it(
    events: list[tuple[int, str]],
) -> None:
    host, counts = HostPage(), {1: 0, 2: 0, 3: 0}
    said, last = 0, 0.0
    for worker, event in events:
        match event:
            case "counts":
                counts[worker] += 1
                said += 1
                host.take(worker, page(counts[worker]))
            case "dies":
                host.leave(worker)
                counts[worker] = 0
            case "forgets":
                host.take(worker, page())
                counts[worker] = 0
        assert value(host) >= last
        last = value(host)

    assert last == said


async def test_a_real_page_survives_being_taken_apart() -> None:
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        for _ in range(3):
            await world.ask("m")
        text = await world.metrics_page()
        host = HostPage()
        host.take(1, text)

    assert parse_metrics("".join(host.pieces())) == parse_metrics(text)
    assert [*parse_page(text)] == [
        line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")
    ]


async def test_histograms_of_two_workers_add_up() -> None:
    async with running_gateway(fleet({"m": ["a"]})) as world:
        await world.ask("m")
        text = await world.metrics_page()
        host = HostPage()
        host.take(1, text)
        host.take(2, text)

    one, two = parse_metrics(text), parse_metrics("".join(host.pieces()))
    name = "citadel_gateway_request_duration_seconds"
    kept = {key for key in one if key[0].startswith(name)}
    assert {key: two[key] for key in kept} == {key: 2 * one[key] for key in kept}
    assert kept
