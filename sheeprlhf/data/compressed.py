"""Files of rows as streams of bytes, unpacked while they are read, with a bound on what they unpack to."""

import bz2
import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from sheeprlhf.config.path_checks import file_kind
from sheeprlhf.utils.errors import DataError

FREE_UNPACKED = 64 * 2**20  # bytes that any file may unpack to
MAX_UNPACKED = 200  # for each byte of the file: text does not shrink to a two-hundredth


def open_data(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends in .gz, .bz2 or .zst."""
    kind = file_kind(file)
    if kind is None or not kind[1]:
        return file.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, kind[1]), 2**16))


def is_compressed(file: Path) -> bool:
    """True if a file is decompressed while it is read."""
    kind = file_kind(file)
    return kind is not None and bool(kind[1])


class _Unpacked(io.RawIOBase):
    """Decompressed bytes of a file.

    Raises:
        DataError: while reading, if the file is damaged, or holds far more than its size.
    """

    def __init__(self, file: Path, compression: str) -> None:
        super().__init__()
        self._file = file
        self._left = max(FREE_UNPACKED, MAX_UNPACKED * file.stat().st_size)
        self._stream: Any
        if compression == ".gz":
            self._stream = gzip.GzipFile(file)
        elif compression == ".bz2":
            self._stream = bz2.BZ2File(file)
        else:
            self._stream = pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise DataError(
                f"{self._file}: damaged, or not compressed as its name says ({error}); fetch or write it again"
            ) from None
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"{self._file}: unpacks to more than {MAX_UNPACKED} times its size: this is no text; give another file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
