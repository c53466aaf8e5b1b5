"""The documentation page's files, from the package itself: nothing is fetched from elsewhere."""

from __future__ import annotations

from importlib.resources import files

CONTENT_TYPES = {
    "docs.html": "text/html; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
    "docs.css": "text/css; charset=utf-8",
}


def read_asset(name: str) -> tuple[bytes, str] | None:
    """Body and content type; ``None`` for any name but the three, so no path can get out."""
    kind = CONTENT_TYPES.get(name)
    if kind is None:
        return None
    return files("citadel_gateway.app").joinpath("static", name).read_bytes(), kind
