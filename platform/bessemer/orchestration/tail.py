"""Following what a program prints on a cluster, over a connection that may fall silent for good."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping

__all__ = ["tail"]

_CONNECT_SECONDS = 10.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A peer that lost its power closes nothing: asked after 10 seconds of silence, given up after 15 more."""


def tail(url: str, headers: Mapping[str, str], silence: float) -> Generator[str | None]:
    """What a websocket sends, until it is closed.

    Args:
        url: http(s), of the websocket.
        headers: of the request.
        silence: seconds.

    Yields:
        text, and None whenever none came for `silence`.

    Raises:
        OSError, aiohttp.ClientError: there is no connection, or none any more.
    """
    loop, texts = asyncio.new_event_loop(), _texts(url, headers)
    coming: asyncio.Task[str] | None = None
    try:
        while True:
            coming = coming or loop.create_task(_next(texts))
            if not loop.run_until_complete(asyncio.wait({coming}, timeout=silence))[0]:
                yield None
                continue
            came, coming = coming, None
            try:
                yield came.result()
            except StopAsyncIteration:
                return
    finally:
        if coming is not None:
            coming.cancel()
            loop.run_until_complete(asyncio.wait({coming}))
        loop.run_until_complete(texts.aclose())
        loop.close()


async def _next(texts: AsyncIterator[str]) -> str:
    return await anext(texts)


async def _texts(url: str, headers: Mapping[str, str]) -> AsyncGenerator[str]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session, session.ws_connect(url) as peer:
        connection = peer.get_extra_info("socket")
        # Pings of the websocket would not do: Ray only sends, and answers none.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        async for message in peer:
            if message.type is aiohttp.WSMsgType.TEXT:
                yield message.data
            elif message.type is aiohttp.WSMsgType.ERROR:
                raise ConnectionError(str(message.data))
