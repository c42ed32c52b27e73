"""The watch over loading a stranger's file: Python tells of sockets and programs, code that runs makes a file."""

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SOCKETS = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "subprocess.Popen"}


class Watch:
    """What has happened since it began."""

    def __init__(self, sentinels: Path) -> None:
        self.sentinels = sentinels
        self.sockets: list[str] = []
        self.programs: list[str] = []

    def code_run(self) -> list[str]:
        """Names of the sentinel files: each is a payload that ran."""
        return sorted(path.name for path in self.sentinels.iterdir())


_watching: list[Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watching:
        if event in _SOCKETS:
            watch.sockets.append(f"{event}{arguments[1:]}")
        elif event in _PROGRAMS and "template_probe" not in str(arguments):  # our own trial of chat templates
            watch.programs.append(f"{event}{arguments}")


sys.addaudithook(_hook)


@contextmanager
def watched(sentinels: Path) -> Iterator[Watch]:
    """Watch this process inside; payloads make files in `sentinels`."""
    sentinels.mkdir(exist_ok=True)
    watch = Watch(sentinels)
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def pickled(path: Path, protocol: int = 4) -> bytes:
    """A pickle that makes the file `path` when it is loaded."""
    return pickle.dumps(Payload(path), protocol=protocol)
