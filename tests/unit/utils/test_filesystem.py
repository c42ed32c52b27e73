"""File systems that lack locks, fsync of folders, permissions or renames over a file: one warning, and on."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from sheeprlhf.engine.manifest import verify_manifest, write_folder, write_manifest
from sheeprlhf.engine.rundir import RunLock, is_locked
from sheeprlhf.utils import output as filesystem
from sheeprlhf.utils.output import MARKER, fsync, locked, make_private, open_file, replace, write_file, written_folder

Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nothing_warned_of() -> None:
    filesystem._warn.cache_clear()


def fails(monkeypatch: Patch, module: object, name: str, code: int, when=lambda *_: True) -> None:
    """Let a function of os or fcntl fail where `when` says so of its arguments."""
    real = getattr(module, name)

    def failing(*words, **options):
        if when(*words):
            raise OSError(code, os.strerror(code))
        return real(*words, **options)

    monkeypatch.setattr(module, name, failing)


def warnings(capsys: Printed) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_no_locks(code: int, tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    """A preparation of another process, which may be at work, stays, and what it finishes first is kept."""
    fails(monkeypatch, fcntl, "flock", code)
    with RunLock(tmp_path), RunLock(tmp_path):
        assert not is_locked(tmp_path)
    folder = tmp_path / "data"
    said: list[str] = []
    with locked(folder, said.append), locked(folder, said.append), written_folder(folder) as one:
        (one / "rows").write_text("same")
        with written_folder(folder) as other:
            (other / "rows").write_text("same")
        assert one.is_dir()
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "rows"]
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []
    assert said == []
    assert len(warnings(capsys)) == 1


def hold(run_dir: Path, ready, done) -> None:
    with RunLock(run_dir):
        ready.set()
        done.wait(20)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_no_fsync_of_folders(code: int, tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    fails(monkeypatch, os, "fsync", code, lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode))

    def write(folder: Path) -> None:
        (folder / "weights").write_text("all")
        write_manifest(folder, {})

    write_folder(tmp_path / "step-1", write)
    verify_manifest(tmp_path / "step-1")
    write_file(tmp_path, "run.json", b"{}")
    assert len(warnings(capsys)) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_disk_is_one(code: int, tmp_path: Path, monkeypatch: Patch) -> None:
    fails(monkeypatch, os, "fsync", code)
    with pytest.raises(OSError, match=os.strerror(code)):
        fsync(tmp_path)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_no_permissions(code: int | None, tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    """Where `code` is None, chmod does nothing, as on vfat mounted quietly."""
    tmp_path.chmod(0o755)
    if code is None:
        monkeypatch.setattr(os, "chmod", lambda *_, **__: None)
    else:
        fails(monkeypatch, os, "chmod", code)
    make_private(tmp_path)
    write_file(tmp_path, "run.json", b"{}")
    assert len(warnings(capsys)) == 1
    monkeypatch.undo()
    make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    assert warnings(capsys) == []


def test_no_rename_over_a_file(tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    write_file(tmp_path, "run.json", b"old")
    fails(monkeypatch, os, "replace", errno.EEXIST)
    write_file(tmp_path, "run.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"new"
    assert len(warnings(capsys)) == 1
    fails(monkeypatch, os, "rename", errno.EIO, lambda source, _: "other" in str(source))
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(OSError, match="output"):
        replace(tmp_path / "other", tmp_path / "run.json")
    assert (tmp_path / "run.json").read_bytes() == b"new"


def test_no_flag_against_links(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    fails(monkeypatch, os, "open", errno.EINVAL, lambda path, flags, *_: flags & os.O_NOFOLLOW)
    with open(open_file(tmp_path / "file", os.O_RDONLY)) as file:
        assert file.read() == "text"
    with pytest.raises(OSError, match="Invalid"):
        open_file(tmp_path / "link", os.O_RDONLY)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mkfs.vfat") is None, reason="needs root and mkfs.vfat")
def test_a_real_vfat(tmp_path: Path, capsys: Printed) -> None:
    image, place = tmp_path / "image", tmp_path / "place"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    place.mkdir()
    subprocess.run(["mkfs.vfat", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        pytest.skip("vfat cannot be mounted here")
    try:
        with RunLock(place):
            write_folder(place / "step-1", lambda folder: write_manifest(folder, {}))
            verify_manifest(place / "step-1")
            write_file(place, "run.json", b"{}")
        assert len(warnings(capsys)) == 1
    finally:
        subprocess.run(["umount", place], check=True)
