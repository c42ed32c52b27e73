"""Standard streams that outlive their terminal or a full disk, and that exist although they were closed."""

import errno
import io
import os
import sys
from typing import TextIO

_GONE = (errno.EIO, errno.EPIPE)  # a closed terminal; a pipe whose reader has ended


class _LastingFile(io.FileIO):
    """A file that drops what cannot be written.

    Attributes:
        needs_reader: a pipe whose reader has ended raises BrokenPipeError.
        error: why something was dropped, if not because the terminal or the reader is gone.
    """

    needs_reader = False
    error: OSError | None = None

    def write(self, data: "io.ReadableBuffer") -> int:  # type: ignore[name-defined]
        """The number of bytes written or dropped."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno == errno.EPIPE and self.needs_reader:
                raise
            if error.errno in _GONE:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            else:  # there may be room again later
                self.error = error
            return len(data)


def open_closed_streams(*, needs_output: bool) -> None:
    """Open the null device for standard streams that the caller has closed, so that no file gets their descriptors.

    With `needs_output`, writing to a closed standard output is an error.
    """
    read, write = os.O_RDONLY, os.O_WRONLY
    modes = (("stdin", read, "r"), ("stdout", read if needs_output else write, "w"), ("stderr", write, "w"))
    for descriptor, (name, flags, mode) in enumerate(modes):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, flags)  # the lowest free descriptor, which is the closed one
            keep = null == descriptor
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8", errors="backslashreplace", closefd=not keep))


def lost_output(stream: TextIO) -> OSError | None:
    """The error because of which a stream that `lasting` returned has dropped output; None if it has dropped none."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.error if isinstance(raw, _LastingFile) else None


def outlives_reader(stream: TextIO) -> bool:
    """True if writing continues without a reader: a BrokenPipeError then has another cause."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return isinstance(raw, _LastingFile) and not raw.needs_reader


def lasting(stream: TextIO, *, needs_reader: bool = False) -> TextIO:
    """The stream of the same file, on which writing continues when the terminal or the reader is gone or the disk full.

    With `needs_reader`, a pipe whose reader has ended still raises BrokenPipeError. Streams of another kind, as in
    notebooks and tests, are returned as they are.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _LastingFile(stream.fileno(), "w", closefd=False)
    raw.needs_reader = needs_reader
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
