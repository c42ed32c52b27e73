"""An OpenAI-compatible server on loopback that answers as a test tells it."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from tests.support.loopback import Handler, Server, running

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, content (text is an answer), headers


class Request(NamedTuple):
    """What the server got."""

    path: str
    authorization: str | None
    body: dict[str, Any]
    time: float


class JudgeServer(Server):
    """Asks `reply` with the text of each question and its number of attempts; lists the model `judge-1`."""

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        super().__init__(_Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.now = self.most = 0
        self.url += "/v1"
        self.models: Reply = (200, {"data": [{"id": "judge-1"}]})


class _Handler(Handler):
    server: JudgeServer

    def answer(self, body: bytes) -> None:
        if self.command == "GET":
            return self._reply(*self.server.models)
        request = Request(self.path, self.headers["Authorization"], json.loads(body), time.monotonic())
        question = request.body["messages"][0]["content"]
        with self.server.lock:
            self.server.requests.append(request)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            attempt = sum(one.body["messages"][0]["content"] == question for one in self.server.requests)
        reply = self.server.reply(question, attempt)
        with self.server.lock:
            self.server.now -= 1
        self._reply(*reply)

    def _reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(content, str):
            content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        self.send(content, status, headers)


def judge_server(reply: Callable[[str, int], Reply]) -> AbstractContextManager[JudgeServer]:
    """Serve until the block ends."""
    return running(JudgeServer(reply))
