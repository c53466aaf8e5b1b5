"""One completion under way, and the JSON it is told in."""

from __future__ import annotations

from typing import Any

import attrs

from citadel_gateway.sim.exchange import SIMULATED
from citadel_gateway.sim.requests import CompletionRequest
from citadel_gateway.sim.tokens import Answer, make_answer


@attrs.define(eq=False, kw_only=True)
class Job:
    """:param answers: ``n`` for each prompt, in the order of their index.
    :param cached: prompt tokens that were not read again.
    :param made: completion tokens so far, over all choices.
    """

    id: str
    model: str
    created: int
    request: CompletionRequest
    answers: tuple[Answer, ...]
    cached: int = 0
    made: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.request.prompts)

    @property
    def steps(self) -> int:
        """Choices are made side by side, so the longest one counts."""
        return max(len(answer.tokens) for answer in self.answers)

    def tokens_at(self, step: int) -> list[tuple[int, str]]:
        """The choices that get a token at *step*, and which."""
        return [
            (index, answer.tokens[step])
            for index, answer in enumerate(self.answers)
            if step < len(answer.tokens)
        ]

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.made,
            "total_tokens": self.prompt_tokens + self.made,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(index, answer) for index, answer in enumerate(self.answers)]
        return self._envelope("", choices) | {"usage": self.usage()}

    def role_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant"}, None)

    def token_chunk(self, index: int, token: str) -> dict[str, Any]:
        return self._chunk(index, {"content": token}, None)

    def finish_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {}, self.answers[index].finish_reason)

    def usage_chunk(self) -> dict[str, Any]:
        return self._envelope(".chunk", []) | {"usage": self.usage()}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        said: dict[str, Any] = {"text": answer.text}
        if self.request.chat:
            said = {"message": {"role": "assistant", "content": answer.text}}
        return {
            "index": index, **said, "logprobs": None, "finish_reason": answer.finish_reason
        }  # fmt: skip

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.request.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        usage = {"usage": self.usage()} if self.request.continuous_usage else {}
        return self._envelope(".chunk", [choice]) | usage

    def _envelope(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # Plain completions have one name for both; OpenAI gave only chat a chunk of its own.
        chat = self.request.chat
        return {
            "id": self.id,
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **SIMULATED,
        }


def make_job(request: CompletionRequest, *, model: str, request_id: str, created: int) -> Job:
    answers = [
        make_answer(
            model,
            prompt.tokens,
            topic=prompt.topic,
            index=index,
            limit=limit,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
        )
        for prompt, limit in zip(request.prompts, request.limits, strict=True)
        for index in range(request.n)
    ]
    return Job(
        id=f"{'chatcmpl' if request.chat else 'cmpl'}-{request_id}",
        model=model,
        created=created,
        request=request,
        answers=tuple(answers),
    )
