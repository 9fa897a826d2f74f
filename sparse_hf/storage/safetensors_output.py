"""A safetensors file that grows tensor by tensor, when lengths are known only once the bytes are there.

The header comes first in the file and says where every tensor lies, so room for it is left and filled in at the end;
the format allows spaces after it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from sparse_hf.storage.piece_output import write_all


LONGEST_DTYPE = "F8_E4M3FNUZ"
LARGEST_OFFSET = 2**63 - 1


class SafetensorsOutput:
    """A new file, to be used in a `with` block; without `finish` what is written is no safetensors file."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            path: the file, replaced if it is there.
            shapes: of every tensor that may be appended; in the file it may also have a single size instead.
        """
        widest = {"dtype": LONGEST_DTYPE, "data_offsets": [LARGEST_OFFSET, LARGEST_OFFSET]}
        room = len(_header({name: {**widest, "shape": [*shape, LARGEST_OFFSET]} for name, shape in shapes.items()}))
        self._begin = 8 + room + -room % 8
        self._end = self._begin
        self._entries: dict[str, dict] = {}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.lseek(self._descriptor, self._begin, os.SEEK_SET)

    def __enter__(self) -> "SafetensorsOutput":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def append(self, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> int:
        """Add a tensor; its bytes are those of the parts, one after the other. Returns how many they are.

        Raises:
            OSError: the disk is full or not writable.
        """
        first = self._end
        for part in parts:
            write_all(self._descriptor, memoryview(part).cast("B"))
            self._end += part.nbytes
        offsets = [first - self._begin, self._end - self._begin]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        return self._end - first

    def finish(self) -> None:
        """Write the header; nothing can be appended afterwards.

        Raises:
            ValueError: a tensor was not announced, and the room for the header is too small.
            OSError: the disk is full or not writable.
        """
        header = _header(self._entries).ljust(self._begin - 8)
        if len(header) > self._begin - 8:
            raise ValueError(
                f"The header takes {len(header)} bytes, {self._begin - 8} were left: announce all `shapes`."
            )
        os.pwrite(self._descriptor, len(header).to_bytes(8, "little") + header, 0)


def _header(entries: Mapping[str, Mapping]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
