"""A hub on the loopback interface: folders of models and datasets, by the few addresses that a download asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub(NamedTuple):
    """A running hub: its address for HF_ENDPOINT, and the paths that it was asked for."""

    endpoint: str
    asked: list[str]


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve folders at one commit.

    Args:
        repositories: folders by "models/<owner>/<name>" or "datasets/<owner>/<name>".
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            for name, folder in repositories.items():
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                if path == f"api/{name}/revision/main" or path == f"api/{name}":
                    listed = [{"rfilename": str(file.relative_to(folder))} for file in files]
                    return self.send({"id": name.partition("/")[2], "sha": COMMIT, "siblings": listed})
                if path in (f"api/{name}/tree/{COMMIT}", f"api/{name}/tree/main"):
                    return self.send([self.entry(folder, file) for file in files])
                for revision in ("main", COMMIT):
                    start = f"{name.removeprefix('models/')}/resolve/{revision}/"
                    file = folder / path.removeprefix(start)
                    if path.startswith(start) and file.is_file():
                        return self.send(file.read_bytes(), {"ETag": f'"{self.entry(folder, file)["oid"]}"'})
            return self.send({}, {"X-Error-Code": "EntryNotFound"}, status=404 if path else 200)

        def entry(self, folder: Path, file: Path) -> dict[str, object]:
            oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
            return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

        def send(self, content: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield Hub(f"http://127.0.0.1:{server.server_port}", asked)
        finally:
            server.shutdown()
            thread.join()
