"""How do the bytes of pieces get into a file fast: copied by the system where they are long, gathered where short?"""

import errno
import os
import sys
from collections.abc import Callable

from sparse_hf.storage.piece_bytes import SourceFiles, piece_blocks, too_short
from sparse_hf.storage.pieces import CopyBytes, Piece


BLOCK_BYTES = 4 << 20
SYSTEM_COPY_BYTES = 256 << 10  # from this length on the system copies, without a way through this process
# Where the system cannot: other file systems, older kernels, special files.
NOT_SUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


class PieceOutput:
    """A file that grows piece by piece, through one buffer of 4 MiB.

    Attributes:
        written: bytes that the system has got.
    """

    def __init__(self, descriptor: int, sources: SourceFiles, progress: Callable[[int], None]) -> None:
        """
        Args:
            descriptor: of the file, open for writing at its end.
            progress: told the number of bytes of each write.
        """
        self.descriptor = descriptor
        self.written = 0
        self._sources = sources
        self._progress = progress
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._filled = 0
        self._system_copies = sys.platform == "linux"

    def write(self, piece: Piece) -> None:
        """Append all bytes of a piece.

        Raises:
            ValueError: its source is too short.
            OSError: the disk is full or not writable.
        """
        if isinstance(piece, CopyBytes):
            self._copy(piece)
            return
        for block in piece_blocks(piece, self._sources):
            self.append(block)

    def append(self, data: bytes) -> None:
        """Append bytes."""
        rest = memoryview(data)
        while rest:
            room = self._room(len(rest))
            room[:] = rest[: len(room)]
            self._filled += len(room)
            rest = rest[len(room) :]

    def flush(self) -> None:
        """Hand what is in the buffer to the system."""
        write_all(self.descriptor, self._buffer[: self._filled])
        self._count(self._filled)
        self._filled = 0

    def _copy(self, piece: CopyBytes) -> None:
        source, offset, end = self._sources.descriptor(piece.file), piece.offset, piece.offset + piece.length
        if self._system_copies and piece.length >= SYSTEM_COPY_BYTES:
            self.flush()
            offset = self._copied_by_the_system(piece, source)
        while offset < end:
            room = self._room(end - offset)
            count = os.preadv(source, [room], offset)
            if count == 0:
                raise too_short(piece.file, end, offset)
            self._filled += count
            offset += count

    def _copied_by_the_system(self, piece: CopyBytes, source: int) -> int:
        """Where the copy has to go on: at the end, unless the system cannot copy between these two files."""
        offset, end = piece.offset, piece.offset + piece.length
        while offset < end:
            try:
                count = os.copy_file_range(source, self.descriptor, min(end - offset, 16 * BLOCK_BYTES), offset)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                self._system_copies = False
                return offset
            if count == 0:
                raise too_short(piece.file, end, offset)
            self._count(count)
            offset += count
        return offset

    def _room(self, wanted: int) -> memoryview:
        """The next at most `wanted` bytes of the buffer, never none; whoever fills them counts them."""
        if self._filled == len(self._buffer):
            self.flush()
        return self._buffer[self._filled : self._filled + wanted]

    def _count(self, written: int) -> None:
        self.written += written
        self._progress(written)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write bytes, however often the system takes only some of them."""
    while data:
        data = data[os.write(descriptor, data) :]
