"""An OpenAI-compatible server on loopback that answers as a test tells it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, content (text is an answer), headers


class Request(NamedTuple):
    """What the server got."""

    path: str
    authorization: str | None
    body: dict[str, Any]
    time: float


class JudgeServer(ThreadingHTTPServer):
    """Asks `reply` with the text of each question and its number of attempts; lists the model `judge-1`."""

    daemon_threads = True

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.now = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.models: Reply = (200, {"data": [{"id": "judge-1"}]})


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        self._send(*self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(self.path, self.headers["Authorization"], body, time.monotonic())
        question = body["messages"][0]["content"]
        with self.server.lock:
            self.server.requests.append(request)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            attempt = sum(one.body["messages"][0]["content"] == question for one in self.server.requests)
        reply = self.server.reply(question, attempt)
        with self.server.lock:
            self.server.now -= 1
        self._send(*reply)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(content, str):
            content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has left
            pass

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def judge_server(reply: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    """Serve until the block ends."""
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
