"""Request filter between the network and the demo's web framework: passes only requests that the page needs."""

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 1_000_000  # bytes of a request
BODY_SECONDS = 20.0  # in which they have to arrive
_ONCE = ("host", "origin", "content-length", "transfer-encoding")
_OF_PROXIES = (b"x-forwarded-", b"forwarded", b"x-gradio-")  # with which a request could change the page's addresses
_PATHS = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(?:static|assets|svelte)/[\w./-]+|/login_check/?|/logout"
        r"|/gradio_api/(?:queue/data|startup-events|heartbeat/\w+|login_check/?|app_id/?)"
    ),
    "POST": re.compile(r"/login/?|/gradio_api/(?:queue/join/?|cancel|reset/?)"),
}
_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI layer: a list of paths, this machine's own names, no other site's pages, headers that keep a page in.

    No uploads, no files, no proxy, no documentation of an API; and no request of the page goes to another machine.

    Args:
        app: what answers.
        hosts: names that the page may be reached by; any, if there are none.
    """

    def __init__(self, app: Application, hosts: tuple[str, ...] = ()) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        status = self._refusal(scope)
        if status:
            await _refuse(send, status)
            return
        body = await _read_body(receive) if scope["method"] == "POST" else b""
        if isinstance(body, int):
            await _refuse(send, body)
            return
        kept = [(name, value) for name, value in scope["headers"] if not name.startswith(_OF_PROXIES)]
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        started = False

        async def receive_on() -> Any:
            return next(messages, None) or await receive()

        async def send_on(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            await self._app({**scope, "headers": kept}, receive_on, send_on)
        except Exception:  # a request that the page does not make
            if started:
                raise
            await _refuse(send, 400)

    def _refusal(self, scope: Scope) -> int:
        """The status of a request that must not get through; 0 for others."""
        method, path = scope["method"], scope["path"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        names = [name.decode("latin-1") for name, _ in scope["headers"]]
        allowed = _PATHS.get("GET" if method == "HEAD" else method)
        if allowed is None or not allowed.fullmatch(path) or ".." in path or "//" in path:
            return 404
        if any(names.count(name) > 1 for name in _ONCE) or "transfer-encoding" in headers:
            return 400  # two readers of the request could disagree on its length, or on who asks
        host = headers.get("host", "")
        if self._hosts and re.sub(r":\d{1,5}$", "", host).strip("[]") not in self._hosts:
            return 403  # a name that somebody else's DNS points here
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403  # another site's page
        length = headers.get("content-length", "" if method == "POST" else "0")
        if not length.isdecimal() or int(length[:10]) > (MAX_BODY if method == "POST" else 0):
            return 413
        return 0


async def _read_body(receive: Receive) -> bytes | int:
    """Read a whole body; the status to refuse it with if it is larger than `MAX_BODY` or comes too slowly."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return 400
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    return 413
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        return 408


async def _refuse(send: Send, status: int) -> None:
    """Answer without the framework, and end the connection: what follows on it is not read."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"not here"})
