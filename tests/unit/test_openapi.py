"""The API's description is whole, and the page that shows it needs nothing from elsewhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from citadel_gateway import errors
from citadel_gateway.app.docs_page import CONTENT_TYPES, read_asset
from citadel_gateway.app.openapi import openapi_document

METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
CLOCKS = ("connect", "headers", "first_token", "idle", "total")
SAMPLES: dict[str, Any] = {"str": "x", "int": 1, "float": 1.0, "list[str]": ["x"]}


@pytest.fixture
def document() -> dict[str, Any]:
    return openapi_document(version="1.2.3")


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within, itself included."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def resolve(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    start, *steps = value["$ref"].split("/")
    assert start == "#"
    found: Any = document
    for step in steps:
        found = found[step]
    assert isinstance(found, dict)
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def every_error() -> list[errors.GatewayError]:
    """One of each that errors.py can make, found by looking, so that a new one is checked, too."""
    made = [errors.timed_out(clock, 1.0, executed=True) for clock in CLOCKS]
    for name, maker in inspect.getmembers(errors, inspect.isfunction):
        signature = inspect.signature(maker)
        # upstream_failed is told its code, so it has none of its own.
        if signature.return_annotation != "GatewayError" or name in {
            "timed_out",
            "upstream_failed",
        }:
            continue
        needed = [p for p in signature.parameters.values() if p.default is p.empty]
        made.append(maker(*(SAMPLES[str(p.annotation)] for p in needed)))
    return made


def test_the_document_is_plain_json_of_openapi_3_1(document: dict[str, Any]) -> None:
    assert orjson.loads(orjson.dumps(document)) == document
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"] == "1.2.3"


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    for value in walk(document):
        if "$ref" in value:
            assert resolve(document, value)


def test_every_component_is_used(document: dict[str, Any]) -> None:
    used = {value["$ref"] for value in walk(document) if "$ref" in value}

    for kind in ("schemas", "parameters", "headers", "responses"):
        for name in document["components"][kind]:
            assert f"#/components/{kind}/{name}" in used


def test_every_operation_is_complete(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    names = [operation["operationId"] for _, _, operation in operations(document)]

    assert len(set(names)) == len(names)
    for path, method, operation in operations(document):
        assert path.startswith("/")
        assert method in METHODS
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        assert "200" in operation["responses"]
        assert ("requestBody" in operation) == (method == "post")


def test_path_parameters_are_those_of_the_path(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        given = [resolve(document, p) for p in operation.get("parameters", [])]
        for parameter in given:
            assert parameter["in"] in {"header", "path"}
            assert isinstance(parameter["schema"], dict)
        in_path = {p["name"] for p in given if p["in"] == "path" and p["required"] is True}
        assert in_path == set(re.findall(r"{(\w+)}", path))


def test_every_response_has_a_description_and_known_headers(document: dict[str, Any]) -> None:
    for _, _, operation in operations(document):
        for status, reference in operation["responses"].items():
            response = resolve(document, reference)
            assert status == "default" or 200 <= int(status) <= 599
            assert response["description"]
            assert "x-request-id" in response["headers"]
            for media in response["content"].values():
                assert isinstance(media["schema"], dict)


def test_schemas_use_the_types_of_json_schema(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        assert schema["type"] == "object"
        assert set(schema.get("required", [])) <= set(schema["properties"])
        for value in walk(schema):
            # A field may be called "type", too; then its value is a schema.
            kinds = value.get("type", [])
            if not isinstance(kinds, dict):
                assert {kinds} <= TYPES if isinstance(kinds, str) else set(kinds) <= TYPES


def test_every_error_code_is_an_example_of_its_status(document: dict[str, Any]) -> None:
    for error in every_error():
        response = document["components"]["responses"][f"Error{error.status}"]
        example = response["content"]["application/json"]["examples"][error.code]["value"]["error"]
        assert example["type"] == error.kind
        assert example["param"] == error.param
        for name, _ in error.all_headers():
            assert name == b"connection" or name.decode() in response["headers"]


def test_every_error_can_come_from_a_chat_request(document: dict[str, Any]) -> None:
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]

    assert {str(error.status) for error in every_error()} <= set(responses)


def test_requests_are_open_and_need_no_model(document: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = resolve(document, body["schema"])
        assert schema["additionalProperties"] is True
        assert "model" not in schema["required"]
        assert schema["properties"]["model"]["default"] == "auto"
        assert set(schema["required"]) <= set(body["example"]) <= set(schema["properties"])


def test_the_paths_follow_the_configuration() -> None:
    paths: Any = openapi_document(version="1", health_path="/h", metrics_path="/m")["paths"]

    assert {"/h", "/m", "/livez", "/readyz"} <= set(paths)
    assert not {"/health", "/metrics"} & set(paths)


@pytest.mark.parametrize(
    ("keys_required", "expected"),
    [(True, [{"bearer": []}]), (False, [{}, {"bearer": []}])],
)
def test_keys_are_asked_for_where_they_are_set_up(
    keys_required: bool, expected: list[object]
) -> None:
    paths: Any = openapi_document(version="1", keys_required=keys_required)["paths"]

    assert paths["/v1/models"]["get"]["security"] == expected
    assert paths["/health"]["get"]["security"] == []


def test_the_page_has_exactly_three_files() -> None:
    for name, kind in CONTENT_TYPES.items():
        asset = read_asset(name)
        assert asset is not None
        assert asset[0]
        assert asset[1] == kind
    for name in ("", "docs", "other.js", "../openapi.py", "static/docs.js", "DOCS.JS"):
        assert read_asset(name) is None


def test_the_page_refers_to_nothing_off_site_and_runs_nothing_inline() -> None:
    for name in CONTENT_TYPES:
        asset = read_asset(name)
        assert asset is not None
        text = asset[0].decode()
        for banned in (r"://", r"""["'`]//""", r"@import", r"\burl\(", r"innerHTML", r"\beval\("):
            assert not re.search(banned, text)

    page = read_asset("docs.html")
    assert page is not None
    html = page[0].decode()
    assert re.findall(r'(?:src|href)="([^"#]+)"', html) == [
        "docs/docs.css",
        "docs/docs.js",
        "openapi.json",
    ]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]


def test_every_control_of_the_page_has_a_label() -> None:
    page = read_asset("docs.html")
    assert page is not None
    html = page[0].decode()

    wrapped = "".join(re.findall(r"<label.*?</label>", html, re.DOTALL))
    named = set(re.findall(r'<label for="(\w+)"', html))
    for control in re.findall(r"<(?:input|textarea|select)[^>]*>", html):
        found = re.search(r' id="(\w+)"', control)
        assert control in wrapped or (found is not None and found[1] in named)
