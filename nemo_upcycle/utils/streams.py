"""Large files that are written from front to end, and are on the disk when closed.

If bytes are taken unchanged from another file, the kernel copies them.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nemo_upcycle.errors import UpcycleError


#: Bytes after which writing to the disk starts. Otherwise the kernel waits until a tenth of the memory is used.
_FLUSH_BYTES = 64 << 20
#: Bytes of one step if the kernel cannot copy.
_STEP_BYTES = 1 << 20
#: Errors of a kernel that cannot copy between two files.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)


@dataclass(frozen=True)
class ByteRange:
    """A range of bytes in an open file.

    Args:
        path: path of the file, for errors.
        descriptor: file descriptor, open for reading.
        start: position of the first byte.
        size_bytes: number of bytes.
    """

    path: Path
    descriptor: int
    start: int
    size_bytes: int


class StreamedFile:
    """A new file to append to. If the block ends without an error, all bytes are on the disk.

    Example:
        >>> with StreamedFile(Path("model.safetensors")) as file:  # doctest: +SKIP
        ...     file.write(header)
        ...     file.copy(part)
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._written = self._flushed = 0

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")  # flatten any shape to single bytes
        while len(view):  # the kernel writes at most 2 GiB per call
            count = self._file.write(view)
            view = view[count:]
            self._count(count)

    def copy(self, part: ByteRange) -> None:
        """Append a range of bytes of another file.

        Raises:
            UpcycleError: the other file ends before the end of the range.
        """
        done, in_kernel = 0, hasattr(os, "copy_file_range")
        while left := part.size_bytes - done:
            if in_kernel:
                count = self._copy_in_kernel(part.descriptor, part.start + done, min(left, _FLUSH_BYTES))
                in_kernel = count > 0  # some file systems copy nothing without reporting an error
            else:
                data = os.pread(part.descriptor, min(left, _STEP_BYTES), part.start + done)
                self.write(data)
                if not (count := len(data)):
                    raise UpcycleError(
                        str(part.path),
                        kind="state",
                        got=f"ends at byte {part.start + done}, {left} bytes too early",
                        fix="copy the file again, and make sure that no other process writes to it",
                    )
            done += count

    def _copy_in_kernel(self, descriptor: int, start: int, most: int) -> int:
        """Append bytes with the kernel's copy, and return their number; 0 if the kernel cannot copy."""
        try:
            count = os.copy_file_range(descriptor, self._file.fileno(), most, offset_src=start)
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
            return 0
        self._count(count)
        return count

    def _count(self, written: int) -> None:
        """Count written bytes; after every 64 MiB, start writing to the disk without waiting."""
        self._written += written
        if self._written - self._flushed >= _FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # The advice that the pages are not needed makes the kernel write the pages to the disk.
            count = self._written - self._flushed
            os.posix_fadvise(self._file.fileno(), self._flushed, count, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written
