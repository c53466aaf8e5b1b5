"""The schema as JSON Schema, for editors: completion, explanations and early errors.

It is generated from the same classes that the loader fills, so the two cannot drift apart; what
JSON Schema cannot say (names that must exist, ports that must differ) only the loader checks.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

import attrs
import orjson
from cattrs import Converter

from citadel_gateway.config import values as v
from citadel_gateway.config.schema import GatewayConfigSchema

Schema = dict[str, object]

_DURATION = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(ms|s|m|h)$"}
_VALUES: Mapping[Any, Schema] = {
    bool: {"type": "boolean"},
    str: {"type": "string", "minLength": 1},
    v.Seconds: {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _DURATION]},
    v.Grace: {"anyOf": [{"type": "number", "minimum": 0}, _DURATION]},
    v.Port: {"type": "integer", "minimum": 0, "maximum": 65535},
    v.Count: {"type": "integer", "minimum": 1},
    v.Room: {"type": "integer", "minimum": 0},
    v.Weight: {"type": "number", "exclusiveMinimum": 0},
    v.Rate: {"type": "number", "exclusiveMinimum": 0},
    v.Cost: {"type": "number", "minimum": 0},
    v.Ratio: {"type": "number", "minimum": 0, "maximum": 1},
    v.Url: {
        "type": "string",
        "pattern": "^(https?://[^@?#\\s]+|unix:/[^?#\\s]+|http\\+unix://%2[Ff][^?#\\s]+)$",
    },
    v.StoreUrl: {
        "type": "string",
        "pattern": "^(rediss?(\\+(sentinel|cluster))?://[^@?#\\s]+|unix:/\\S+)$",
    },
    v.KeyPrefix: {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
    v.HeaderName: {"type": "string", "pattern": "^[Xx]-[A-Za-z0-9-]{1,62}$"},
    v.UrlPath: {"type": "string", "pattern": "^(/[A-Za-z0-9._~-]+)+$"},
    v.Name: {"type": "string", "pattern": "^\\S+$", "maxLength": 128},
    v.Secret: {"type": "string", "minLength": 1},
    v.Sha256: {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    v.Network: {"type": "string", "pattern": "^[0-9A-Fa-f:.]+(/[0-9]+)?$"},
    v.Origin: {"type": "string", "pattern": r"^(\*|[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+)$"},
}

_plain = Converter(unstruct_collection_overrides={tuple: list}).unstructure


def json_schema() -> dict[str, object]:
    """The whole file, as draft 2020-12."""
    definitions: dict[str, Schema] = {}
    root = _section(GatewayConfigSchema, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Citadel Gateway configuration",
        **root,
        "anyOf": [{"required": ["models"]}, {"required": ["backends"]}],
        "$defs": dict(sorted(definitions.items())),
    }


def dumps() -> str:
    """The text of ``config/gateway.schema.json``."""
    return orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2).decode() + "\n"


def _section(cls: type[Any], definitions: dict[str, Schema]) -> Schema:
    fields = attrs.fields(attrs.resolve_types(cls))
    schema: Schema = {
        "type": "object",
        "description": inspect.getdoc(cls),
        "properties": {field.name: _option(field, definitions) for field in fields},
        "additionalProperties": False,
    }
    if needed := [field.name for field in fields if field.default is attrs.NOTHING]:
        schema["required"] = needed
    return schema


def _option(field: attrs.Attribute[Any], definitions: dict[str, Schema]) -> Schema:
    schema = _of(field.type, definitions)
    described: Schema = {"description": field.metadata["doc"]}
    if field.default is attrs.NOTHING:
        return {**schema, **described}
    if attrs.has(type(field.default)):  # its own options show their defaults
        return {**_or_null(schema), **described}
    if isinstance(field.default, tuple):
        schema = _or_null(schema)
    return {**schema, **described, "default": _plain(field.default)}


def _of(type_: Any, definitions: dict[str, Schema]) -> Schema:
    arguments = get_args(type_)
    if get_origin(type_) in (types.UnionType, Union):  # typing makes the latter of a NewType
        return _or_null(_of(arguments[0], definitions))
    if get_origin(type_) is tuple:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if get_origin(type_) is dict:
        return {
            "type": "object",
            "minProperties": 1,
            "propertyNames": _of(arguments[0], definitions),
            "additionalProperties": _of(arguments[1], definitions),
        }
    name = type_.__name__
    if name not in definitions:
        definitions[name] = {"title": name, **_define(type_, definitions)}
    return {"$ref": f"#/$defs/{name}"}


def _define(type_: Any, definitions: dict[str, Schema]) -> Schema:
    if attrs.has(type_):
        return _section(type_, definitions)
    if type_ in _VALUES:
        return _VALUES[type_]
    members: type[enum.Enum] = type_
    return {"description": inspect.getdoc(members), "enum": [e.value for e in members]}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
