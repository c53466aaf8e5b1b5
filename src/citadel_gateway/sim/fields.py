"""Typed access to a JSON object from outside; what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from citadel_gateway.sim.exchange import Refusal


@attrs.frozen
class Fields:
    """A JSON object.  An absent field and an explicit null are the same."""

    raw: dict[str, Any]

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str):
            raise wrong(name, "a string")
        return value

    def integer(self, name: str, *, low: int, high: int | None = None) -> int | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(name, "an integer")
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise wrong(name, bounds, value)
        return value

    def number(self, name: str) -> float | None:
        value = self.raw.get(name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise wrong(name, "a number")
        return value

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, "a boolean")
        return bool(value)

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or a list of them; empty ones are dropped."""
        value = self.raw.get(name)
        found = [value] if isinstance(value, str) else value or []
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise wrong(name, "a string or a list of strings")
        return tuple(item for item in found if item)

    def object(self, name: str) -> Fields | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise wrong(name, "an object")
        return None if value is None else Fields(value)

    def objects(self, name: str) -> list[Fields]:
        """A list of at least one object."""
        value = self.raw.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise wrong(name, "a list of objects")
        if not value:
            raise Refusal(f"`{name}` must not be empty.", param=name)
        return [Fields(item) for item in value]


def parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Refusal(f"The body is not JSON: {exc}") from exc


def parse_fields(body: bytes) -> Fields:
    raw = parse_json(body)
    if not isinstance(raw, dict):
        raise Refusal("The body must be a JSON object.")
    return Fields(raw)


def wrong(name: str, expected: str, got: object = "") -> Refusal:
    tail = f", got {got}" if got != "" else ""
    return Refusal(f"`{name}` must be {expected}{tail}.", param=name)
