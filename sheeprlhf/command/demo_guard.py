"""What stands between the network and the demo's web framework: only what the page needs gets through."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 1_000_000  # bytes of a request
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
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not here"})
            return

        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self._app(scope, receive, send_on)

    def _refusal(self, scope: Scope) -> int:
        """The status of a request that must not get through; 0 for others."""
        method, path = scope["method"], scope["path"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        allowed = _PATHS.get("GET" if method == "HEAD" else method)
        if allowed is None or not allowed.fullmatch(path) or ".." in path or "//" in path:
            return 404
        host = headers.get("host", "")
        if self._hosts and (urlsplit(f"//{host}").hostname or "") not in self._hosts:
            return 403  # a name that somebody else's DNS points here
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403  # another site's page
        if method == "POST":
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                return 413
        return 0
