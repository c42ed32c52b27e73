"""Standard streams whose terminal or reader is gone."""

import io
import os
import pty

import pytest

from sheeprlhf.utils.streams import lasting


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


def test_other_errors_are_raised() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = lasting(stream_to(full.fileno(), write_through=True))
        with pytest.raises(OSError, match="space"):
            stream.write("lost\n")


def test_a_stream_without_a_file_stays() -> None:
    stream = io.StringIO()
    assert lasting(stream) is stream
