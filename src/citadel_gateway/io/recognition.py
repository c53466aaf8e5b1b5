"""Finding out which engine is behind an endpoint of which nobody has said it."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from citadel_gateway.io.dial import Origin
from citadel_gateway.io.transport import ORIGIN
from citadel_gateway.wire.engine_signs import read_models, read_more

_MOST_READ = 256 * 1024  # of a list of models


async def recognise(
    client: httpx.AsyncClient, root: str, headers: Mapping[str, str], origin: Origin
) -> str:
    """What the server under *root* is, by its own answers; empty if they do not tell.

    Raises ``httpx.HTTPError``.
    """

    async def get(path: str) -> bytes:
        return await get_small(client, root + path, headers, origin)

    clue = read_models(await get("/v1/models"))
    return read_more(clue.ask, await get(clue.ask)) if clue.ask else clue.engine


async def get_small(
    client: httpx.AsyncClient, url: str, headers: Mapping[str, str], origin: Origin
) -> bytes:
    """What is at *url*; nothing if the status is not 200, or if it is too long."""
    asking = client.stream("GET", url, headers=headers, extensions={ORIGIN: origin})
    async with asking as response:
        body = b""
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > _MOST_READ:
                return b""
        return body if response.status_code == httpx.codes.OK else b""
