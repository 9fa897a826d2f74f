"""Is another process saving to the same place?"""

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparse_hf.storage.durable import clear_disk_errors


@contextlib.contextmanager
def only_saver(path: Path) -> Iterator[None]:
    """Hold `path`, which need not exist, for one saving process; what a killed one left beside it is cleared away.

    The lock is a file `.<name>.lock` beside `path`; the system frees that of a killed process.

    Raises:
        FileExistsError: another process, or thread, is saving there.
        OSError: the folder above is not writable.
    """
    path = path.resolve()
    lock = path.parent / f".{path.name}.lock"
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        if not _locked(descriptor, lock):
            raise FileExistsError(
                f"Another process is saving to `{path}`: only one may at a time. Wait for it or choose another folder."
            )
        try:
            _clear_leftovers(path)
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have removed the file between our two calls; a lock on it binds nobody.
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except (BlockingIOError, FileNotFoundError):
        return False


def _clear_leftovers(path: Path) -> None:
    """Remove the temporary folders of killed saves; one that holds the only copy of the old folder gives it back."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if (leftover / "old").is_dir() and not path.exists():
            (leftover / "old").rename(path)
        shutil.rmtree(leftover, ignore_errors=True)
