"""Requests to servers that a user names: no redirects, a limit on every answer, no proxy in front of this machine."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

SHOWN = 200  # characters of a server's message or of an error
_TRANSIENT = (408, 425, 429)  # and 500 to 599
_MISCONFIGURED = (401, 403, 404, 405)  # no request will succeed
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a retry, doubled each time
Result = TypeVar("Result")


class FailedRequestError(Exception):
    """A request without a usable answer, after its retries; the message is the reason."""


class RejectedError(Exception):
    """A server that rejects every request: the status of its answer, and the beginning of its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"the server answered {status}: {text}")
        self.status = status


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


async def request_until(
    server: httpx.AsyncClient,  # of `client`
    url: str,
    body: dict[str, Any],  # JSON
    parse: Callable[[Any], Result],  # of the answer's JSON; KeyError: another answer may be better, ValueError: none
    *,
    seconds: float,  # limit of each attempt
    retries: int,  # most further attempts
    show: Callable[[bytes], str],  # makes the beginning of a server's message for an error
    no_answer: str,  # the reason after an attempt that took too long
) -> Result:
    """Post until the answer can be parsed; wait before retries. Raises FailedRequestError, RejectedError."""
    reason, wait = "", 0.0
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(max(wait, min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT)))
        try:
            async with asyncio.timeout(seconds):
                status, headers, content = await request(server, "POST", url, body)
        except TimeoutError:
            reason = no_answer
            continue
        except httpx.HTTPError as error:
            reason = describe(error)
            continue
        if status == 200:
            try:
                return parse(parse_answer(content))
            except KeyError as error:
                reason = str(error.args[0])
                continue
            except ValueError as error:
                raise FailedRequestError(str(error)) from None
        if status in _MISCONFIGURED or 300 <= status < 400:
            raise RejectedError(status, show(content))
        reason = f"the server answered {status}: {show(content)}"
        if not is_transient(status):
            raise FailedRequestError(reason)
        delay = headers.get("retry-after", "")
        wait = min(float(delay), _LONGEST_WAIT) if delay.isdecimal() else 0.0
    raise FailedRequestError(f"{reason} ({retries + 1} attempts)")
