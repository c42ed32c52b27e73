"""What gets through to the demo's web framework, and what does not."""

import asyncio

import pytest

from sheeprlhf.apps.serve.demo import MAX_BODY, Guard


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


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/static/../../etc/passwd",
        "/assets/..",
        "/assets//etc/passwd",
        "//example.com/",
        "/\\example.com",
        "/monitoring",
        "/config/x\n",
        "",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_nothing_else_does(method, path):
    assert answered(method, path, content_length="0")[::2] == (404, False)


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/call/answers", "/"])
def test_uploads_and_calls_past_the_queue_do_not(path):
    assert answered("POST", path, content_length="0")[::2] == (404, False)
    assert answered("PUT", "/", content_length="0")[::2] == (404, False)


def test_a_request_of_the_page_has_a_limit():
    for length, status in ((str(MAX_BODY), 200), (str(MAX_BODY + 1), 413), ("x", 413), ("-1", 413)):
        assert answered("POST", "/gradio_api/queue/join", content_length=length)[0] == status
    assert answered("POST", "/gradio_api/queue/join")[0] == 413


def test_other_names_and_other_sites_do_not_get_through():
    for host, status in (("localhost:7860", 200), ("[::1]:7860", 200), ("evil.example:7860", 403), ("", 403)):
        assert answered("GET", "/", host=host)[0] == status
    for origin, status in (("http://127.0.0.1:7860", 200), ("http://127.0.0.1:1", 403), ("null", 403)):
        assert answered("GET", "/", origin=origin)[0] == status
