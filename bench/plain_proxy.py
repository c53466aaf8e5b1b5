"""The rival: the plain way to build such a gateway, with nothing but forwarding.

Quart-Trio on stock Hypercorn, one httpx.AsyncClient, defaults throughout.  No keys, no limits, no
breaker, no metrics, no log: what it costs is the stack.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

import httpx
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import Response, request
from quart_trio import QuartTrio


def make_app(upstream: str) -> QuartTrio:
    app = QuartTrio(__name__)
    app.config["RESPONSE_TIMEOUT"] = None
    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60)

    @app.get("/readyz")
    async def ready() -> Response:
        return Response("ready")

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        body = await request.get_data()
        headers = {"content-type": "application/json"}
        built = client.build_request(
            "POST", upstream + "/v1/chat/completions", content=body, headers=headers
        )
        answer = await client.send(built, stream=True)

        async def relay() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        return Response(relay(), answer.status_code, content_type=answer.headers["content-type"])

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    arguments = parser.parse_args()
    config = Config()
    config.bind = [f"127.0.0.1:{arguments.port}"]
    trio.run(serve, make_app(arguments.upstream), config)


if __name__ == "__main__":
    main()
