"""The server of `demo` over a real socket: what gets through, what it tells, and whose conversation is whose."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sheeprlhf.apps import demo as demo_guard
from tests.e2e.test_demo import served
from tests.support.models import byte_tokenizer, make_model_folder
from tests.support.talking import TEMPLATE

pytestmark = pytest.mark.slow
JOIN = "POST /gradio_api/queue/join HTTP/1.1"
OWN = "Host: 127.0.0.1:PORT"
CHUNKED = "Transfer-Encoding: chunked"
PREFLIGHT = "Access-Control-Request-Method: POST"

# The head of a request, what follows it, and the statuses that may answer. CLOSED: the connection ends without one.
CLOSED = 0
REQUESTS = [
    ([JOIN, OWN, "Content-Length: 4", CHUNKED], b"0\r\n\r\nGET /config HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
    ([JOIN, OWN, CHUNKED], b"0\r\n\r\n", {400}),
    ([JOIN, OWN, "Content-Length: 4", CHUNKED], (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 40, {400, CLOSED}),
    ([JOIN, OWN, "Transfer-Encoding: x, chunked", "Content-Length: 4"], b"abcd", {400, 501}),
    ([JOIN, OWN, "Content-Length: 4", "Content-Length: 5"], b"12345", {400}),
    ([JOIN, OWN, "Content-Length: +4"], b"1234", {400}),
    ([JOIN, OWN, "Content-Length: 5000000"], b"", {413}),
    ([JOIN, OWN, f"Content-Length: {'9' * 4000}"], b"", {400, 413}),
    ([JOIN, OWN, "Content-Type: application/json", "Content-Length: 10"], b"{", {408}),
    ([JOIN, OWN, "Content-Type: application/json", "Content-Length: 200000"], b"[" * 200_000, {400}),
    ([JOIN, OWN, "Content-Type: application/json", "Content-Length: 2"], b"{}", {422}),
    (["GET /config HTTP/1.1", OWN, "Content-Length: 100000000"], b"", {413}),
    (["GET /config HTTP/1.1", OWN, CHUNKED], b"", {400}),
    (["GET / HTTP/1.1", OWN, "Host: evil"], b"", {400}),
    (["GET / HTTP/1.1", "Host: [::1"], b"", {403}),
    (["GET / HTTP/1.1", "Host: evil.example"], b"", {403}),
    (["GET / HTTP/1.1", "Host: evil@127.0.0.1"], b"", {403}),
    (["GET / HTTP/1.1", "Host: 127.0.0.1.evil.example:PORT"], b"", {403}),
    (["GET / HTTP/1.1", "Host: 127.0.0.1:PORT:80"], b"", {403}),
    (["GET / HTTP/1.0"], b"", {403}),
    (["GET http://evil/config HTTP/1.1", OWN], b"", {404}),
    (["GET / HTTP/1.1", OWN, "Origin: http://[::1"], b"", {403}),
    (["GET / HTTP/1.1", OWN, "Origin: null"], b"", {403}),
    (["GET / HTTP/1.1", OWN, "Origin: http://evil.example"], b"", {403}),
    (["GET / HTTP/1.1", OWN, "Origin: http://localhost:PORT"], b"", {403}),
    (["GET / HTTP/1.1", OWN, "Origin: http://evil", "Origin: http://127.0.0.1:PORT"], b"", {400}),
    (["OPTIONS /gradio_api/queue/join HTTP/1.1", OWN, "Origin: http://evil", PREFLIGHT], b"", {200, 400, 404}),
    (["PUT / HTTP/1.1", OWN, "Content-Length: 0"], b"", {404}),
    *(
        ([f"POST {path} HTTP/1.1", OWN, "Content-Length: 0"], b"", {404})
        for path in ("/", "/docs", "/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/call/answers")
    ),
    *(
        ([f"GET {path} HTTP/1.1", OWN], b"", {404})
        for path in (
            "/file=/etc/passwd",
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=../../etc/passwd",
            "/gradio_api/file=..%2f..%2fetc/passwd",
            "/gradio_api/stream/a/b/c/playlist.m3u8",
            "/gradio_api/upload",
            "/gradio_api/proxy=http://127.0.0.1:22/",
            "/static/..%2f..%2fetc/passwd",
            "/static/%2e%2e/x",
            "/static/..%5cx",
            "/static/../x",
            "/assets/%252e%252e/x",
            "/static//etc/passwd",
            "/static/etc/passwd",
            "/static/%00",
            "/svelte/%ff",
            "/theme.css/../config",
            "/\\evil.example",
            *("/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/runs", "/docs", "/redoc", "/openapi.json"),
            *("/assets/..", "/assets//etc/passwd", "//evil.example/", "/monitoring", "/gradio_api/file/etc/passwd"),
        )
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A page whose model repeats what it was asked: its port and the model's folder."""
    folder = make_model_folder(tmp_path_factory.mktemp("demo") / "model", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    def repeat(model: object, prompt_ids: object, cfg: object, *, end_ids: object, **_: object) -> Iterator[int]:
        yield from [*prompt_ids.tolist()[1:], end_ids[0]][: cfg.max_new_tokens]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sheeprlhf.task.text_generator.stream_ids", repeat)
        patch.setattr(demo_guard, "BODY_SECONDS", 0.5)
        with served({"one": folder}) as url:
            yield int(url.rpartition(":")[2]), folder


def sent(port: int, head: list[str], body: bytes) -> bytes:
    """Everything that the server answers to one request."""
    text = "\r\n".join([*head, "Connection: close", "", ""]).replace("PORT", str(port))
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(text.encode() + body)
            while part := connection.recv(65536):
                answer += part
        except (BrokenPipeError, ConnectionResetError):
            pass
    return answer


def test_requests_that_the_page_does_not_make_are_refused(page, capfd):
    port, _ = page
    for head, body, allowed in REQUESTS:
        answer = sent(port, head, body)
        status = int(answer.split()[1]) if answer else CLOSED
        assert status in allowed, (head, answer[:300])
        assert answer.count(b"HTTP/1.1 ") <= 1, head  # what follows a refused request is not read
        assert not re.search(rb"allow-origin: (\*|null|https?://evil)", answer) and b"root:" not in answer
    assert "Traceback" not in capfd.readouterr().err
    answer = sent(port, ["GET / HTTP/1.1", OWN], b"")
    assert b" 200 OK" in answer[:20]
    headers = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"x-frame-options: deny" in headers and b"referrer-policy: no-referrer" in headers
    [policy] = re.findall(rb"content-security-policy: (.*)\r", headers)
    assert b"default-src 'self'" in policy and b"frame-ancestors 'none'" in policy and b"http" not in policy


def test_the_page_names_no_path_and_no_other_host(page):
    port, folder = page
    forwarded = ["X-Forwarded-Host: evil.example", "X-Forwarded-Prefix: /evil", "Forwarded: host=evil.example"]
    for path in ("/", "/config"):
        answer = sent(port, [f"GET {path} HTTP/1.1", OWN, *forwarded], b"")
        assert b" 200 OK" in answer[:20] and b"evil" not in answer
        for secret in (folder.parent, Path.cwd(), Path.home()):
            assert f"{secret}/".encode() not in answer


def joined(port: int, session: str, prompt: str, function: int) -> int:
    """Put a question into the queue; the status."""
    data = {"data": [prompt, None, 0.0, 1.0, 0, 512, 1], "fn_index": function, "session_hash": session}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/gradio_api/queue/join",
        json.dumps(data).encode(),
        {"content-type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def answered(port: int, session: str) -> str:
    """What the queue sends to a session, up to the end of its question."""
    events = []
    url = f"http://127.0.0.1:{port}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(url, timeout=60) as stream:
        for line in stream:
            events.append(line.decode())
            if '"process_completed"' in events[-1]:
                break
    return "".join(events)


def test_visitors_have_conversations_of_their_own_and_a_full_queue_is_reported(page):
    port, _ = page
    config = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/config").read())
    ask = [entry["id"] for entry in config["dependencies"] if len(entry["inputs"]) == 7][1]
    assert "shorten it" in (joined(port, "long", "x" * 900_000, ask), answered(port, "long"))[1]
    assert joined(port, "unknown", "a", 999) == 400

    def talk(number: int) -> str:
        for text in (f"first-{number}-", f"second-{number}-"):
            assert joined(port, f"visitor{number}", text, ask) == 200
            printed = answered(port, f"visitor{number}")
        return printed

    with ThreadPoolExecutor(6) as threads:
        for number, printed in enumerate(threads.map(talk, range(6))):
            assert f"first-{number}-" in printed and f"second-{number}-" in printed
            assert not [other for other in range(6) if other != number and f"-{other}-" in printed]
    with ThreadPoolExecutor(40) as threads:
        statuses = Counter(threads.map(lambda number: joined(port, f"flood{number}", "a", ask), range(80)))
    assert statuses[503] > 40 and set(statuses) == {200, 503}
    assert threading.active_count() < 200 and sent(port, ["GET /config HTTP/1.1", OWN], b"").count(b" 200 OK") == 1
