"""A hub on the loopback interface: folders of models and datasets, by the few addresses that a download asks for."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from tests.support.loopback import Handler, Server, running

COMMIT = "c" * 40


class Hub(NamedTuple):
    """A running hub: its address for HF_ENDPOINT, and the paths that it was asked for."""

    endpoint: str
    asked: list[str]


class _Handler(Handler):
    protocol_version = "HTTP/1.1"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve folders at one commit.

    Args:
        repositories: folders by "models/<owner>/<name>" or "datasets/<owner>/<name>".
    """
    asked: list[str] = []

    class Folders(_Handler):
        def answer(self, body: bytes) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            for name, folder in repositories.items():
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                if path == f"api/{name}/revision/main" or path == f"api/{name}":
                    listed = [
                        {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files
                    ]
                    return self.send({"id": name.partition("/")[2], "sha": COMMIT, "siblings": listed})
                if path in (f"api/{name}/tree/{COMMIT}", f"api/{name}/tree/main"):
                    return self.send([self.entry(folder, file) for file in files])
                for revision in ("main", COMMIT):
                    start = f"{name.removeprefix('models/')}/resolve/{revision}/"
                    file = folder / path.removeprefix(start)
                    if path.startswith(start) and file.is_file():
                        tag = f'"{self.entry(folder, file)["oid"]}"'
                        return self.send(file.read_bytes(), headers={"ETag": tag, "X-Repo-Commit": COMMIT})
            return self.send({}, 404 if path else 200, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

        def entry(self, folder: Path, file: Path) -> dict[str, object]:
            oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
            return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

    with running(Server(Folders)) as server:
        yield Hub(server.url, asked)


class UploadHub(NamedTuple):
    """A running hub that takes uploads.

    Attributes:
        endpoint: its address for HF_ENDPOINT.
        repositories: visibility by "<owner>/<name>"; None if the request left it to the hub.
        files: contents by "<owner>/<name>/<path>".
        asked: method and path of each request.
    """

    endpoint: str
    repositories: dict[str, str | None]
    files: dict[str, bytes]
    asked: list[str]


@contextmanager
def serve_uploads(token: str) -> Iterator[UploadHub]:
    """Take commits of whoever has the token: small files in the commit, weights as large files before it."""
    repositories: dict[str, str | None] = {}
    files: dict[str, bytes] = {}
    large: dict[str, bytes] = {}
    asked: list[str] = []

    class Uploads(_Handler):
        def answer(self, body: bytes) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"{self.command} {path}")
            if path.startswith("large/"):  # signed addresses, without a token
                large[path.removeprefix("large/")] = body
                return self.send({})
            if path and self.headers.get("Authorization") != f"Bearer {token}":
                return self.send({"error": "Invalid credentials"}, 401)
            words = path.split("/")
            if path == "api/whoami-v2":
                return self.send({"type": "user", "name": "me"})
            if path == "api/repos/create":
                asks = json.loads(body)
                name = f"{asks['organization']}/{asks['name']}"
                repositories[name] = asks.get("visibility")
                return self.send({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            if path == "api/validate-yaml":
                return self.send({"errors": [], "warnings": []})
            if path.endswith(".git/info/lfs/objects/batch"):
                address = f"http://{self.headers['Host']}/large/"
                objects = [
                    one | {"actions": {"upload": {"href": address + one["oid"]}}} for one in json.loads(body)["objects"]
                ]
                return self.send({"transfer": "basic", "objects": objects})
            name = "/".join(words[2:4])
            if len(words) > 4 and words[4] == "preupload":
                modes = [
                    {"path": one["path"], "shouldIgnore": False, "uploadMode": self.mode(one["path"])}
                    for one in json.loads(body)["files"]
                ]
                return self.send({"files": modes})
            if len(words) > 4 and words[4] == "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[f"{name}/{value['path']}"] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[f"{name}/{value['path']}"] = large[value["oid"]]
                return self.send(
                    {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
                )
            if path.startswith("api/models/") and name in repositories:
                private = repositories[name] == "private"
                return self.send({"id": name, "sha": COMMIT, "private": private, "siblings": []})
            return self.send({"error": "Repository not found"}, 404 if path else 200, {"X-Error-Code": "RepoNotFound"})

        def mode(self, path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

    with running(Server(Uploads)) as server:
        yield UploadHub(server.url, repositories, files, asked)
