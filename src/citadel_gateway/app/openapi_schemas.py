"""The JSON bodies of the API, as schemas.

Requests are open (``additionalProperties``): what the gateway does not know, it passes on to
the engine.  Only fields that it reads, or that nearly every client sends, are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def one(kind: str | list[str], doc: str = "", **more: Any) -> Schema:
    """A single value.  ``one("integer", "...", minimum=0)``."""
    described = {"description": doc} if doc else {}
    return {"type": kind, **described, **more}


def many(items: Schema, doc: str = "", **more: Any) -> Schema:
    return one("array", doc, items=items, **more)


def thing(
    properties: Mapping[str, Schema], *, required: tuple[str, ...] = (), doc: str = ""
) -> Schema:
    """An object that may hold more than is listed."""
    needs = {"required": list(required)} if required else {}
    return one("object", doc, properties=dict(properties), **needs, additionalProperties=True)


def map_of(values: Schema, doc: str = "") -> Schema:
    return one("object", doc, additionalProperties=values)


MODEL = one(
    "string",
    "A model's id or alias. Absent, empty or `auto`: the gateway chooses.",
    default="auto",
)
STOP = {
    "description": "Where to stop, at the latest.",
    "oneOf": [one("string"), many(one("string"))],
}

# What chat and text completions have in common.
SAMPLING: dict[str, Schema] = {
    "stream": one("boolean", "Answer by server-sent events.", default=False),
    "stream_options": thing(
        {"include_usage": one("boolean", "End the stream with a chunk that holds `usage`.")}
    ),
    "max_tokens": one(["integer", "null"], "Longest answer, in tokens.", minimum=0),
    "temperature": one(["number", "null"], minimum=0, maximum=2),
    "top_p": one(["number", "null"], minimum=0, maximum=1),
    "n": one(["integer", "null"], "Answers wanted.", minimum=0),
    "stop": STOP,
    "seed": one(["integer", "null"]),
    "presence_penalty": one(["number", "null"], minimum=-2, maximum=2),
    "frequency_penalty": one(["number", "null"], minimum=-2, maximum=2),
    "logit_bias": one(["object", "null"], additionalProperties=one("number")),
    "user": one("string", "Your own id of the end user."),
}

FINISH = one(
    ["string", "null"],
    "`stop`, `length`, `tool_calls`, `content_filter`; null until a stream's last chunk.",
)
TOOL_CALL = thing(
    {
        "id": one("string"),
        "type": one("string"),
        "function": thing({"name": one("string"), "arguments": one("string", "JSON, as text.")}),
    }
)
ANSWER_HEAD: dict[str, Schema] = {
    "id": one("string"),
    "object": one("string"),
    "created": one("integer", "Unix time."),
    "model": one("string"),
}

REQUESTS: dict[str, Schema] = {
    "ChatCompletionRequest": thing(
        {
            "model": MODEL,
            "messages": many(ref("ChatMessage"), minItems=1),
            **SAMPLING,
            "max_completion_tokens": one(["integer", "null"], "As max_tokens.", minimum=0),
            "logprobs": one(["boolean", "null"]),
            "top_logprobs": one(["integer", "null"], minimum=0, maximum=20),
            "response_format": one("object", "`text`, `json_object` or `json_schema`."),
            "tools": many(one("object"), "Functions that the model may call."),
            "tool_choice": {
                "description": "`none`, `auto`, `required`, or a function.",
                "oneOf": [one("string"), one("object")],
            },
            "parallel_tool_calls": one("boolean"),
        },
        required=("messages",),
    ),
    "ChatMessage": thing(
        {
            "role": one("string", "`system`, `developer`, `user`, `assistant` or `tool`."),
            "content": {
                "description": "Text, or parts such as `{\"type\": \"text\", \"text\": \"...\"}`.",
                "oneOf": [one("string"), many(one("object")), one("null")],
            },
            "name": one("string"),
            "tool_calls": many(TOOL_CALL),
            "tool_call_id": one("string"),
        },
        required=("role",),
    ),
    "CompletionRequest": thing(
        {
            "model": MODEL,
            "prompt": {
                "description": "Text or token ids, one or several.",
                "oneOf": [one("string"), many({"oneOf": [
                    one("string"), one("integer"), many(one("integer")),
                ]})],
            },
            **SAMPLING,
            "suffix": one(["string", "null"]),
            "echo": one("boolean", "Repeat the prompt before the answer."),
            "best_of": one("integer", minimum=0),
            "logprobs": one(["integer", "null"], minimum=0),
        },
        required=("prompt",),
    ),
    "EmbeddingRequest": thing(
        {
            "model": MODEL,
            "input": {
                "description": "Text or token ids, one or several.",
                "oneOf": [one("string"), many({"oneOf": [
                    one("string"), one("integer"), many(one("integer")),
                ]})],
            },
            "encoding_format": one("string", enum=["float", "base64"], default="float"),
            "dimensions": one("integer", minimum=0),
            "user": one("string", "Your own id of the end user."),
        },
        required=("input",),
    ),
}  # fmt: skip

ANSWERS: dict[str, Schema] = {
    "ChatCompletion": thing(
        {
            **ANSWER_HEAD,
            "choices": many(
                thing(
                    {
                        "index": one("integer"),
                        "message": ref("ChatMessage"),
                        "finish_reason": FINISH,
                        "logprobs": one(["object", "null"]),
                    }
                )
            ),
            "usage": ref("Usage"),
        },
        required=("id", "object", "created", "model", "choices"),
    ),
    "ChatCompletionChunk": thing(
        {
            **ANSWER_HEAD,
            "choices": many(
                thing(
                    {
                        "index": one("integer"),
                        "delta": thing(
                            {
                                "role": one("string"),
                                "content": one(["string", "null"]),
                                "tool_calls": many(TOOL_CALL),
                            }
                        ),
                        "finish_reason": FINISH,
                    }
                ),
                "Empty in the chunk that holds `usage`.",
            ),
            "usage": ref("Usage"),
        },
        required=("id", "object", "created", "model", "choices"),
    ),
    "Completion": thing(
        {
            **ANSWER_HEAD,
            "choices": many(
                thing(
                    {
                        "index": one("integer"),
                        "text": one("string"),
                        "finish_reason": FINISH,
                        "logprobs": one(["object", "null"]),
                    }
                )
            ),
            "usage": ref("Usage"),
        },
        required=("id", "object", "created", "model", "choices"),
        doc="Also the shape of each event of a stream.",
    ),
    "EmbeddingList": thing(
        {
            "object": one("string", const="list"),
            "model": one("string"),
            "data": many(
                thing(
                    {
                        "object": one("string", const="embedding"),
                        "index": one("integer"),
                        "embedding": {
                            "description": "Numbers, or text if base64 was asked for.",
                            "oneOf": [many(one("number")), one("string")],
                        },
                    }
                )
            ),
            "usage": ref("Usage"),
        },
        required=("object", "data", "model"),
    ),
    "Usage": thing(
        {
            "prompt_tokens": one("integer"),
            "completion_tokens": one("integer"),
            "total_tokens": one("integer"),
        }
    ),
}

GATEWAY: dict[str, Schema] = {
    "Model": thing(
        {
            "id": one("string"),
            "object": one("string", const="model"),
            "created": one("integer", "Unix time."),
            "owned_by": one("string"),
            "capabilities": many(one("string", enum=["chat", "completions", "embeddings"])),
            "context_window": one(["integer", "null"], "Tokens of prompt and answer together."),
            "aliases": many(one("string"), "Other names you may ask for."),
            "status": one("string", enum=["available", "unavailable"]),
        },
        required=("id", "object", "created", "owned_by"),
    ),
    "ModelList": thing(
        {"object": one("string", const="list"), "data": many(ref("Model"))},
        required=("object", "data"),
    ),
    "Health": thing(
        {
            "status": one("string", enum=["healthy", "degraded", "unhealthy"]),
            "gateway": one("string", "The service's name."),
            "models": many(one("string"), "The models that can answer now."),
            "timestamp": one("string", "ISO 8601.", format="date-time"),
            "panic": many(
                one("string"), "Models with too few healthy endpoints, so that all are used."
            ),
            "cordoned": map_of(
                one("integer"), "Endpoints that are out of service by command, by model id."
            ),
            "workers": map_of(one("integer"), "Of several: how many serve, of how many."),
        },
        required=("status", "gateway", "models", "timestamp"),
    ),
    "Probe": thing({"status": one("string")}),
    "EndpointStatus": thing(
        {
            "url": one("string"),
            "engine": one("string", "As configured, else as found out; `auto` while unknown."),
            "healthy": one("boolean", "By its last health checks."),
            "breaker": one("string", enum=["closed", "open", "half_open"]),
            "in_flight": one("integer", "Requests it works on."),
            "max_concurrent": one("integer"),
            "limit": one("integer", "What it may have now, at most `max_concurrent`."),
            "cordoned": one("boolean", "Out of service by command."),
            "slow_start_share": one("number", "Below 1 while it has not long been back."),
            "weight": one("number"),
            "latency_seconds": one(["number", "null"]),
            "last_error": one(["string", "null"]),
            "last_probe_seconds_ago": one(["number", "null"]),
        },
        required=("url", "engine", "healthy", "breaker", "in_flight", "max_concurrent", "weight"),
    ),
    "EndpointOrder": thing(
        {
            "endpoint": one("string", "Its URL; of a name with addresses: all of them."),
            "model": one("string", "Only as an endpoint of this model."),
            "within": one("number", "Seconds that a drain may take.", minimum=0, default=30),
        },
        required=("endpoint",),
    ),
    "EndpointAddition": thing(
        {
            "endpoint": one("string", "Its URL."),
            "model": one("string", "The model that it serves, or an alias."),
            "weight": one("number", "Share of the load; default: the model's."),
            "max_concurrent": one("integer", "Requests at once; default: the model's."),
            "adaptive_concurrency": one("boolean", "Default: the model's."),
            "min_concurrent": one("integer", "Default: the model's."),
            "engine": one("string", "Default: the model's."),
            "resolve": one("string", "Default: the model's."),
        },
        required=("endpoint", "model"),
    ),
    "Endpoints": thing(
        {
            "endpoints": many(
                thing(
                    {
                        "model": one("string"),
                        "endpoint": one("string", "Its URL."),
                        "cordoned": one("boolean", "It gets nothing new."),
                        "in_flight": one("integer", "Requests it works on."),
                        "healthy": one("boolean"),
                    }
                )
            ),
            "drained": one(
                "boolean", "Of a drain or a removal: whether its last request has ended."
            ),
        },
        required=("endpoints",),
    ),
    "RouteExplanation": thing(
        {
            "reason": one("string", "Why these models come into question."),
            "algorithm": one("string", "How one endpoint is picked among them."),
            "prompt_tokens_estimate": one("integer", "Four characters to the token."),
            "would_pick": one(["object", "null"], "Model and endpoint; null: it would wait."),
            "groups": one("array", "Endpoints, in order of preference.", items={"type": "object"}),
        },
        required=("reason", "algorithm", "would_pick", "groups"),
    ),
    "ModelsStatus": thing(
        {
            "gateway": one("string"),
            "status": one("string", enum=["healthy", "degraded", "unhealthy"]),
            "timestamp": one("string", "ISO 8601.", format="date-time"),
            "models": map_of(
                thing(
                    {
                        "status": one("string"),
                        "endpoints": many(ref("EndpointStatus")),
                        "sources": many(
                            thing(
                                {
                                    "source": one(
                                        "string", enum=["file", "order", "backend", "dns", "srv"]
                                    ),
                                    "name": one("string", "Its path, or the name."),
                                    "endpoints": one("integer", "How many it lists."),
                                    "problems": many(
                                        one("string"),
                                        "Why an older list is in use; none if it is not.",
                                    ),
                                }
                            ),
                            "What lists endpoints besides the configuration.",
                        ),
                        "panic": one("boolean", "Too few are healthy, so that all are used."),
                        "waiting": one("integer", "Requests in the model's queue."),
                    }
                ),
                "By model id.",
            ),
            "configuration": one(
                "object",
                "Which configuration is in use (generation, since, sha256), how many older ones "
                "still have requests, and what was wrong with the file when it was last read.",
            ),
            "limits": one("object", "The gateway's limits, and how far they are used."),
            "workers": many(one("object"), "Of several, each process, and how it fares."),
            "hosts": many(one("object"), "With a store: those that share it, this one first."),
        },
        required=("gateway", "status", "timestamp", "models"),
    ),
    "Error": thing(
        {
            "error": thing(
                {
                    "message": one("string", "For people."),
                    "type": one("string"),
                    "param": one(["string", "null"], "The field or header at fault."),
                    "code": one(["string", "null"], "For programs; see each response."),
                },
                required=("message", "type", "param", "code"),
            )
        },
        required=("error",),
    ),
}

SCHEMAS: dict[str, Schema] = {**REQUESTS, **ANSWERS, **GATEWAY}
