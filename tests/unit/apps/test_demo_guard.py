"""What gets through to the demo's web framework, and what does not."""

import asyncio

import pytest

from sheeprlhf.apps.serve.demo import Guard


def answered(method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bool]:
    """Status, headers, and whether the framework was asked."""
    asked, sent = [], []

    async def app(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"yes")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    asyncio.run(Guard(app, hosts=("127.0.0.1", "localhost", "::1"))(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, bool(asked)


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/Index-1a.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/a1"]
)
def test_the_page_gets_through_with_headers_that_keep_it_in(path):
    status, headers, asked = answered("GET", path)
    assert (status, asked, headers["x-app"]) == (200, True, "yes")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert headers["x-frame-options"] == "DENY" and headers["referrer-policy"] == "no-referrer"
