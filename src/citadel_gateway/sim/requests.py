"""Request bodies as the engine understands them; unknown fields are ignored, as in vLLM."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from citadel_gateway.sim.exchange import Refusal
from citadel_gateway.sim.fields import Fields, wrong
from citadel_gateway.sim.profile import EngineProfile
from citadel_gateway.sim.tokens import tokenize


@attrs.frozen(kw_only=True)
class Prompt:
    """:param topic: the part of the prompt that an answer quotes."""

    tokens: tuple[str, ...]
    topic: str


@attrs.frozen(kw_only=True)
class CompletionRequest:
    """:param limits: tokens allowed to an answer, one for each prompt."""

    chat: bool
    prompts: tuple[Prompt, ...]
    limits: tuple[int, ...]
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    ignore_eos: bool


@attrs.frozen(kw_only=True)
class EmbeddingRequest:
    inputs: tuple[tuple[str, ...], ...]
    base64: bool
    width: int


def parse_completion(fields: Fields, profile: EngineProfile, *, chat: bool) -> CompletionRequest:
    check_model(fields.text("model"), profile)
    prompts = (_chat_prompt(fields),) if chat else _text_prompts(fields)
    limit = fields.integer("max_tokens", low=1)
    if chat:
        limit = fields.integer("max_completion_tokens", low=1) or limit
    elif limit is None:
        limit = 16  # OpenAI's default for plain completions
    fields.number("temperature")
    stream, options = fields.flag("stream"), fields.object("stream_options")
    if options and options.raw and not stream:
        raise Refusal("Stream options can only be defined when `stream=True`.")
    include_usage = bool(options and options.flag("include_usage"))
    return CompletionRequest(
        chat=chat,
        prompts=prompts,
        limits=tuple(_room(len(prompt.tokens), limit, profile) for prompt in prompts),
        n=fields.integer("n", low=1, high=128) or 1,
        stop=fields.strings("stop"),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=bool(include_usage and options and options.flag("continuous_usage_stats")),
        ignore_eos=fields.flag("ignore_eos"),
    )


def parse_embedding(fields: Fields, profile: EngineProfile) -> EmbeddingRequest:
    check_model(fields.text("model"), profile)
    encoding = fields.raw.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise wrong("encoding_format", "'float' or 'base64'")
    inputs = tuple(tuple(tokens) for _, tokens in _texts(fields.raw.get("input"), "input"))
    for tokens in inputs:
        _check_length(len(tokens), profile)
    width = fields.integer("dimensions", low=1, high=profile.embedding_width)
    return EmbeddingRequest(
        inputs=inputs, base64=encoding == "base64", width=width or profile.embedding_width
    )


def check_model(model: str, profile: EngineProfile) -> None:
    if model != profile.model:
        raise Refusal(f"The model `{model}` does not exist.", 404, "NotFoundError", "model")


def _chat_prompt(fields: Fields) -> Prompt:
    """Messages under a plain template: ``<|role|>``, the text, and an opening for the answer."""
    parts, topic = [], ""
    if tools := fields.raw.get("tools"):
        parts.append(f"<|tools|>\n{orjson.dumps(tools).decode()}\n")
    for message in fields.objects("messages"):
        role, text = message.text("role"), _content(message.raw.get("content"))
        parts.append(f"<|{role}|>\n{text}\n")
        topic = text if role == "user" else topic
    return Prompt(tokens=tuple(tokenize("".join([*parts, "<|assistant|>\n"]))), topic=topic)


def _content(content: Any) -> str:
    """The text of a message; a part that is not text stands as its type."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise wrong("messages", "given content that is a string or a list of parts")
    return "".join(str(part.get("text", f"<{part.get('type')}>")) for part in content)


def _text_prompts(fields: Fields) -> tuple[Prompt, ...]:
    found = _texts(fields.raw.get("prompt"), "prompt")
    return tuple(Prompt(tokens=tuple(tokens), topic=text) for text, tokens in found)


def _texts(value: Any, name: str) -> list[tuple[str, list[str]]]:
    """The four shapes of OpenAI's input: a text, texts, token ids, lists of token ids."""
    many = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not many:
        raise Refusal(f"`{name}` must not be empty.", param=name)
    found = []
    for item in many:
        if isinstance(item, str):
            found.append((item, tokenize(item)))
        elif _is_ids(item):
            found.append(("", [f"<{number}>" for number in item]))
        else:
            raise wrong(name, "a string, a list of strings, or token ids")
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _room(prompt: int, limit: int | None, profile: EngineProfile) -> int:
    """Tokens an answer may have; refused in vLLM's words when the context is too small."""
    _check_length(prompt, profile)
    window = profile.context_window
    if limit is not None and prompt + limit > window:
        raise Refusal(
            f"'max_tokens' or 'max_completion_tokens' is too large: {limit}. This model's maximum"
            f" context length is {window} tokens and your request has {prompt} input tokens"
            f" ({limit} > {window} - {prompt})."
        )
    return window - prompt if limit is None else limit


def _check_length(tokens: int, profile: EngineProfile) -> None:
    if tokens >= profile.context_window:
        raise Refusal(
            f"This model's maximum context length is {profile.context_window} tokens. However,"
            f" your request has {tokens} input tokens. Please reduce the length of the input"
            " messages."
        )
