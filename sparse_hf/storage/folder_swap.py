"""Can two folders change places in one step, so that a kill never finds neither?"""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path


RENAME_EXCHANGE = 2
CURRENT_FOLDER = -100  # AT_FDCWD: relative paths mean what they mean elsewhere
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # older kernels, some file systems


def swapped(first: Path, second: Path) -> bool:
    """Let two folders on one file system change places, atomically; False if the system cannot, with nothing changed.

    Raises:
        OSError: the system can, and refused these two.
    """
    rename = _renameat2()
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if rename(CURRENT_FOLDER, names[0], CURRENT_FOLDER, names[1], RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """The C library's function; Python has none that swaps."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
