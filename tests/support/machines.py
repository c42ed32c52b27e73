"""Two machines in one: network namespaces that a cable joins, where this user may make them."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.jobs import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class TwoMachines:
    """Two network namespaces with an interface each; see `two_machines`."""

    def __init__(self, name: str) -> None:
        self.names = (f"{name}a", f"{name}b")

    def words(self, node: int, private: Path | None = None) -> list[str]:
        """What to put before a command that shall run on a machine, which may see an empty folder at `private`."""
        words = ["ip", "netns", "exec", self.names[node]]
        if private is None:
            return words
        mount = f'mount -t tmpfs none "{private}" && exec "$@"'
        return [*words, "unshare", "--mount", "sh", "-c", mount, "sh"]

    def environment(self, node: int, cache: Path, port: int = 29500) -> dict[str, str]:
        """What Lightning and gloo want to know, and a cache of the machine's own."""
        return {
            "NODE_RANK": str(node),
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": self.names[node],
            "SHEEPRLHF_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def cut(self) -> None:
        """Pull the plug of the second machine."""
        _ip("-n", self.names[1], "link", "set", self.names[1], "down")


@contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Two machines for a `with` block; where none can be made, the test is skipped with the reason."""
    if os.geteuid() != 0:
        pytest.skip("two machines: only root can make network namespaces")
    missing = [program for program in ("ip", "unshare", "mount") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"two machines: there is no {' and no '.join(missing)} here")
    machines = TwoMachines(f"sh{os.getpid() % 10**6}")
    first, second = machines.names
    try:
        try:
            for name in machines.names:
                _ip("netns", "add", name)
            _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
            for name, address in zip(machines.names, ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                _ip("-n", name, "link", "set", name, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two machines: {' '.join(error.cmd)} is not allowed here: {error.stderr.strip()}")
        yield machines
    finally:
        for name in machines.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A new file system of `size` bytes in memory at `folder`; where none can be mounted, the test is skipped."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    """Make a small disk larger."""
    _mount("-o", f"remount,size={size}", str(folder))


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Inside, nothing can be written below `folder`, by root neither."""
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,ro,bind", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


def fill(folder: Path) -> Path:
    """A file that takes all the space of a small disk."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path
