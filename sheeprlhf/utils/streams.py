"""Standard output and standard error that outlive their terminal."""

import errno
import io
import os
from typing import TextIO

_GONE = (errno.EIO, errno.EPIPE)  # a closed terminal; a pipe whose reader has ended


class _LastingFile(io.FileIO):
    """A file that drops what is written after its terminal or its reader is gone."""

    def write(self, data: "io.ReadableBuffer") -> int:  # type: ignore[name-defined]
        """The number of bytes written or dropped."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def lasting(stream: TextIO) -> TextIO:
    """The stream of the same file, on which writing goes on when the terminal or the reader is gone.

    Streams of another kind, as in notebooks and tests, are returned as they are.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _LastingFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
