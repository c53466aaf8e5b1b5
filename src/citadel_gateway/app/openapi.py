"""The API described for programs: OpenAPI 3.1, served at /openapi.json and shown at /docs.

Tables on top, and below them the few functions that lay them out as OpenAPI wants it.
"""

from __future__ import annotations

from typing import Any

from citadel_gateway.app.openapi_schemas import SCHEMAS, Schema, one, ref
from citadel_gateway.policy.priority import NAMES

ABOUT = (
    "One OpenAI-compatible address in front of your own language-model servers. "
    "Every error has OpenAI's shape; `code` is what programs match on."
)

TAGS = {
    "Generation": "Answers from the models, in OpenAI's format.",
    "Models": "What can be asked for, and how it fares.",
    "Operation": "Health, metrics and this description. No model is asked.",
}

HEADERS: dict[str, Schema] = {
    "x-request-id": one("string", "The request's id: yours, or one the gateway made."),
    "x-citadel-model": one("string", "The model that answered."),
    "x-citadel-backend": one("string", "The endpoint that answered."),
    "x-citadel-route-reason": one("string", "Why this model was chosen."),
    "x-citadel-attempts": one("integer", "Endpoints asked, the last included."),
    "x-citadel-overhead-ms": one("number", "Time the gateway itself took, in milliseconds."),
    "retry-after": one("integer", "Whole seconds until the same request would be admitted."),
    "retry-after-ms": one("integer", "The same in milliseconds."),
    "x-should-retry": one(
        "string",
        "`false`: an engine may have worked on it already, or a retry cannot help.",
        enum=["false"],
    ),
    "x-ratelimit-limit-requests": one("integer", "Requests that the tightest limit allows."),
    "x-ratelimit-remaining-requests": one("integer", "Requests left of it."),
    "x-ratelimit-reset-requests": one("string", "Until all of it is back, such as `1s` or `6m0s`."),
    "www-authenticate": one("string", "How to authenticate.", const="Bearer"),
    "allow": one("string", "The methods that the path has."),
}  # fmt: skip

ALWAYS = ["x-request-id"]
ROUTED = [name for name in HEADERS if name.startswith("x-citadel-")]
LIMITED = [name for name in HEADERS if name.startswith("x-ratelimit-")]
AGAIN = ["retry-after", "retry-after-ms"]

PARAMETERS: dict[str, dict[str, Any]] = {
    "RequestId": {
        "name": "x-request-id",
        "in": "header",
        "description": "Your own id: up to 128 visible ASCII characters, passed on and returned.",
        "schema": one("string", maxLength=128),
    },
    "Timeout": {
        "name": "x-citadel-timeout",
        "in": "header",
        "description": "Seconds to wait at most. It may shorten `request_timeout_seconds`, "
        "never lengthen it.",
        "schema": one("number", exclusiveMinimum=0),
    },
    "Priority": {
        "name": "x-citadel-priority",
        "in": "header",
        "description": "The class of the request when there is a queue. It may lower the key's "
        "`max_priority`, never raise it; without keys, that is `default`.",
        "schema": one("string", enum=list(NAMES)),
    },
    "Session": {
        "name": "x-session-id",
        "in": "header",
        "description": "The session that the request belongs to, passed on to the engine. Where "
        "the gateway goes by sessions, they keep theirs. `session_header` may be another one.",
        "schema": one("string"),
    },
    "Traceparent": {
        "name": "traceparent",
        "in": "header",
        "description": "W3C trace context, passed on to the engine.",
        "schema": one("string"),
    },
    "Model": {
        "name": "model",
        "in": "path",
        "required": True,
        "description": "An id or alias. Slashes may stand as they are.",
        "schema": one("string"),
    },
}

ERRORS: dict[int, tuple[str, str, tuple[str, ...]]] = {
    400: ("The request is malformed, or too long for the model.", "invalid_request_error",
          ("invalid_request", "invalid_type", "missing", "empty", "duplicate_key",
           "too_long", "unsupported_request", "context_length_exceeded",
           "bad_http_request")),
    401: ("A key is needed, and there was none or an unknown one.", "invalid_request_error",
          ("invalid_api_key",)),
    403: ("The key may not do that.", "permission_error", ("model_not_allowed", "admin_required")),
    404: ("There is no such model, endpoint or path.", "invalid_request_error",
          ("model_not_found", "endpoint_not_found", "not_found")),
    405: ("The path has no such method.", "invalid_request_error", ("method_not_allowed",)),
    413: ("The body is larger than `performance.max_body_bytes`.", "invalid_request_error",
          ("request_too_large",)),
    415: ("The body is not JSON.", "invalid_request_error", ("unsupported_media_type",)),
    429: ("Over the caller's own limit, or the engine's.", "requests",
          ("rate_limit_exceeded", "upstream_overloaded")),
    431: ("The head of the request is too large.", "invalid_request_error", ("bad_http_request",)),
    500: ("The gateway failed.", "server_error", ("internal_error",)),
    502: ("The engine failed, and no other could take over.", "server_error",
          ("upstream_connection_error", "upstream_protocol_error", "upstream_redirect",
           "upstream_credentials_exhausted")),
    503: ("No room or no healthy endpoint now.", "server_error",
          ("no_healthy_backend", "draining", "queue_full", "queue_timeout", "overloaded",
           "upstream_overloaded", "gateway_exhausted", "too_many_connections",
           "workers_unavailable")),
    504: ("A clock ran out.", "server_error",
          ("timeout_connect", "timeout_headers", "timeout_first_token", "timeout_idle",
           "timeout_total")),
}  # fmt: skip

PARAMS = {
    "model_not_found": "model",
    "model_not_allowed": "model",
    "endpoint_not_found": "endpoint",
    "unsupported_media_type": "content-type",
}
# type server_overloaded
QUEUE_CODES = {"queue_full", "queue_timeout", "overloaded", "too_many_connections"}

ERROR_HEADERS: dict[int, list[str]] = {
    401: ["www-authenticate"],
    405: ["allow"],
    429: [*AGAIN, *LIMITED, "x-should-retry"],
    500: [*ROUTED, "x-should-retry"],
    502: [*ROUTED, "x-should-retry"],
    503: [*ROUTED, *AGAIN, "x-should-retry"],
    504: [*ROUTED, "x-should-retry"],
}

ORDERS = {
    "cordon": "Give an endpoint nothing new",
    "uncordon": "Give an endpoint requests again",
    "drain": "Cordon an endpoint and wait until it has no requests",
    "add": "Let a model have one more endpoint",
    "remove": "Take back an endpoint that was added, and wait until it has no requests",
}

_WANTED = {"add": "EndpointAddition"}  # the body, if it is not that of all orders

KEY_ERRORS = (401, 403)
PLAIN_ERRORS = (405, 431, 500)
POST_ERRORS = (400, *KEY_ERRORS, 404, *PLAIN_ERRORS, 413, 415, 429, 502, 503, 504)


def openapi_document(
    *,
    version: str,
    health_path: str = "/health",
    metrics_path: str = "/metrics",
    keys_required: bool = False,
) -> dict[str, object]:
    """The whole description; the paths are those of this gateway's configuration."""
    locked: Schema = {"security": [{"bearer": []}] if keys_required else [{}, {"bearer": []}]}
    paths: dict[str, Any] = {
        "/v1/chat/completions": {
            "post": {
                **locked,
                **generation(
                    "createChatCompletion", "Continue a conversation",
                    "ChatCompletionRequest", "ChatCompletion", "ChatCompletionChunk",
                    {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 50},
                ),
            }
        },
        "/v1/completions": {
            "post": {
                **locked,
                **generation(
                    "createCompletion", "Continue a text",
                    "CompletionRequest", "Completion", "Completion",
                    {"prompt": "Once upon a time", "max_tokens": 50},
                ),
            }
        },
        "/v1/embeddings": {
            "post": {
                **locked,
                **generation(
                    "createEmbedding", "Turn texts into vectors",
                    "EmbeddingRequest", "EmbeddingList", None,
                    {"input": ["a text", "another"]},
                ),
            }
        },
        "/v1/models": {
            "get": {
                **locked,
                **reading("listModels", "Models", "List the models", "ModelList", KEY_ERRORS),
            }
        },
        "/v1/models/{model}": {
            "get": {
                **locked,
                **reading(
                    "retrieveModel", "Models", "Look up a model", "Model", (*KEY_ERRORS, 404)
                ),
                "parameters": [parameter("Model"), parameter("RequestId")],
            }
        },
        "/models/status": {
            "get": {
                **locked,
                **reading(
                    "modelsStatus", "Models", "State of each model and endpoint",
                    "ModelsStatus", KEY_ERRORS,
                ),
            }
        },
        "/models/route": {
            "post": {
                **locked,
                **reading(
                    "explainRoute", "Models", "Where a chat request would go, without sending it",
                    "RouteExplanation", (400, *KEY_ERRORS, 404, 413, 429),
                ),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": ref("ChatCompletionRequest")}},
                },
            }
        },
        "/admin/endpoints": {
            "get": {
                **locked,
                **reading(
                    "listEndpoints", "Operation", "Endpoints, and which are cordoned",
                    "Endpoints", KEY_ERRORS,
                ),
            }
        },
        **{
            f"/admin/endpoints/{name}": {"post": {**locked, **order(name, summary)}}
            for name, summary in ORDERS.items()
        },
        health_path: {"get": health()},
        "/livez": {"get": probe("livez", "Whether the process answers")},
        "/healthz": {"get": probe("healthz", "The same as /livez")},
        "/health/liveliness": {"get": probe("liveliness", "The same as /livez")},
        "/readyz": {"get": probe("readyz", "Whether it should get traffic", can_fail=True)},
        "/health/readiness": {
            "get": probe("readiness", "The same as /readyz", can_fail=True)
        },
        metrics_path: {
            "get": page("metrics", "Metrics for Prometheus", "text/plain", "Its text format.")
        },
        "/openapi.json": {
            "get": page("openapi", "This description", "application/json", "OpenAPI 3.1.")
        },
        "/docs": {
            "get": page("docs", "This description for people", "text/html", "A web page.")
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "Citadel Gateway", "version": version, "description": ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": doc} for name, doc in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "parameters": PARAMETERS,
            "headers": {name: described(schema) for name, schema in HEADERS.items()},
            "responses": {f"Error{status}": error(status) for status in ERRORS},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key made by `citadel-gateway keygen`. "
                    + ("Needed here." if keys_required else "Not needed here: no key is set up."),
                }
            },
        },
    }


def generation(
    name: str, summary: str, request: str, whole: str, event: str | None, example: Schema
) -> dict[str, Any]:
    """A POST that an engine answers; *event* is the shape of each event, if it can stream."""
    content: dict[str, Any] = {"application/json": {"schema": ref(whole)}}
    if event is not None:
        content["text/event-stream"] = {
            "schema": one(
                "string",
                f"If `stream` is true: events `data: {{...}}` of the shape {event}, then "
                "`data: [DONE]`. A stream that fails midway ends with an event that holds "
                "`error`, and without `[DONE]`.",
            ),
            "x-event-schema": ref(event),
        }
    answer = {
        "description": "The answer.",
        "headers": headers(ALWAYS, ROUTED, LIMITED),
        "content": content,
    }
    refusal = {
        "description": "The engine's own refusal, in the same shape; without a code of its own, "
        "`upstream_` and the status.",
        "headers": headers(ALWAYS, ROUTED),
        "content": {"application/json": {"schema": ref("Error")}},
    }
    return {
        "operationId": name,
        "tags": ["Generation"],
        "summary": summary,
        "parameters": [
            parameter(p) for p in ("RequestId", "Timeout", "Priority", "Session", "Traceparent")
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref(request), "example": example}},
        },
        "responses": {"200": answer, **errors(POST_ERRORS), "default": refusal},
    }


def reading(
    name: str, tag: str, summary: str, schema: str, failures: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A GET that the gateway answers by itself, in JSON."""
    answer = {
        "description": "The answer.",
        "headers": headers(ALWAYS),
        "content": {"application/json": {"schema": ref(schema)}},
    }
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "parameters": [parameter("RequestId")],
        "responses": {"200": answer, **errors((*failures, *PLAIN_ERRORS))},
    }


def order(name: str, summary: str) -> dict[str, Any]:
    """What an operator asks for: with an admin key, or from the machine itself."""
    return {
        **reading(name, "Operation", summary, "Endpoints", (400, *KEY_ERRORS, 404, 413, 415)),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref(_WANTED.get(name, "EndpointOrder"))}},
        },
    }


def health() -> dict[str, Any]:
    found = reading("health", "Operation", "Health of the gateway and its models", "Health")
    found["responses"]["200"]["description"] = "Healthy, or degraded: some models cannot answer."
    found["responses"]["503"] = found["responses"]["200"] | {"description": "No model can answer."}
    return {"security": [], **found}


def probe(name: str, summary: str, *, can_fail: bool = False) -> dict[str, Any]:
    """For service managers and load balancers: they look at the status only."""
    found = reading(name, "Operation", summary, "Probe")
    if can_fail:
        found["responses"]["503"] = found["responses"]["200"] | {
            "description": "Draining, or no model can answer."
        }
    return {"security": [], **found}


def page(name: str, summary: str, kind: str, doc: str) -> dict[str, Any]:
    schema = one("object") if kind == "application/json" else one("string")
    answer = {
        "description": doc,
        "headers": headers(ALWAYS),
        "content": {kind: {"schema": schema}},
    }
    return {
        "operationId": name,
        "tags": ["Operation"],
        "summary": summary,
        "security": [],
        "responses": {"200": answer, **errors(PLAIN_ERRORS)},
    }


def error(status: int) -> dict[str, Any]:
    """An error response, with an example for each of its codes."""
    doc, kind, codes = ERRORS[status]
    examples = {
        code: {
            "value": {
                "error": {
                    "message": doc,
                    "type": "server_overloaded" if code in QUEUE_CODES else kind,
                    "param": PARAMS.get(code),
                    "code": code,
                }
            }
        }
        for code in codes
    }
    return {
        "description": f"{doc} Codes: {', '.join(f'`{code}`' for code in codes)}.",
        "headers": headers(ALWAYS, ERROR_HEADERS.get(status, [])),
        "content": {"application/json": {"schema": ref("Error"), "examples": examples}},
    }


def errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    return {str(s): {"$ref": f"#/components/responses/Error{s}"} for s in sorted(statuses)}


def headers(*groups: list[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for group in groups for name in group}


def parameter(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/parameters/{name}"}


def described(schema: Schema) -> dict[str, Any]:
    """A header object: the description beside the schema rather than within."""
    inner = {key: value for key, value in schema.items() if key != "description"}
    return {"description": schema["description"], "schema": inner}
