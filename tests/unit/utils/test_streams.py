"""Standard streams whose terminal or reader is gone."""

import errno
import io
import os
import pty
from contextlib import nullcontext
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.utils.processes import lasting, lost_output


def stream_to(descriptor: int, *, write_through: bool = False) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        raw if write_through else io.BufferedWriter(raw), line_buffering=True, write_through=write_through
    )


@pytest.mark.parametrize("write_through", [False, True])
@pytest.mark.parametrize("make", [os.pipe, pty.openpty])
def test_writing_goes_on(make, write_through: bool) -> None:
    reader, writer = make()
    stream = lasting(stream_to(writer, write_through=write_through))
    stream.write("here\n")
    assert os.read(reader, 100).strip() == b"here"
    os.close(reader)
    for _ in range(3):
        stream.write("lost\n")
    stream.flush()
    os.close(writer)


@pytest.mark.parametrize("write_through", [False, True])
def test_a_full_disk_is_remembered(write_through: bool, tmp_path: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = lasting(stream_to(full.fileno(), write_through=write_through))
        assert lost_output(stream) is None
        stream.write("lost\n")
        error = lost_output(stream)
        assert error is not None and error.errno == errno.ENOSPC
        with (tmp_path / "file").open("wb") as file:
            os.dup2(file.fileno(), full.fileno())
        stream.write("there is room again\n")
    assert (tmp_path / "file").read_text() == "there is room again\n"


def test_a_reader_that_has_ended_can_be_an_error() -> None:
    reader, writer = os.pipe()
    stream = lasting(stream_to(writer, write_through=True), needs_reader=True)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        stream.write("lost\n")
    assert lost_output(stream) is None and lost_output(io.StringIO()) is None
    os.close(writer)


@pytest.mark.parametrize(("needs_reader", "code"), [(False, 1), (True, None)])
def test_a_broken_pipe_of_another_kind_is_an_error(
    needs_reader: bool, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training does not end because of its output, so it must not be called done."""

    def fail(_: object) -> int:
        raise BrokenPipeError

    reader, writer = os.pipe()
    monkeypatch.setattr("sys.stdout", lasting(stream_to(writer), needs_reader=needs_reader))
    monkeypatch.setattr("sheeprlhf.cli._dispatch", fail)
    with pytest.raises(SystemExit) if code else nullcontext() as ended:
        run(["train"])
    assert code is None or ended.value.code == code
    os.close(reader)
    os.close(writer)
