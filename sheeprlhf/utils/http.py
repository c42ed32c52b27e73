"""Requests to servers that a user names: no redirects, a limit on every answer, no proxy in front of this machine."""

from typing import Any
from urllib.parse import urlsplit

import httpx

SHOWN = 200  # characters of a server's message or of an error
_TRANSIENT = (408, 425, 429)  # and 500 to 599


def client(url: str, timeout: float, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
    """Return a client for one server that follows no redirect, and uses no proxy to reach this machine."""
    return httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=not is_local(url))


async def request(
    server: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None, *, limit: int = 1 << 20
) -> tuple[int, httpx.Headers, bytes]:
    """Send a request; return status, headers and at most `limit` bytes of the answer."""
    content = b""
    async with server.stream(method, url, json=body) as response:
        async for part in response.aiter_bytes():
            content += part
            if len(content) > limit:
                break
    return response.status_code, response.headers, content[:limit]


def is_local(url: str) -> bool:
    """True for an address of this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def is_transient(status: int) -> bool:
    """True if the same request may succeed later."""
    return status in _TRANSIENT or status >= 500


def parse_answer(content: bytes) -> Any:
    """Return the JSON value of an answer; None if it has none."""
    try:
        return httpx.Response(200, content=content).json()
    except (ValueError, RecursionError):
        return None


def describe(error: Exception) -> str:
    """Return an error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]
