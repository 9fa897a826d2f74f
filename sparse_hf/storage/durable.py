"""How is a file written so that a crash leaves the old one or the new one, never half of one?"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def clear_disk_errors(target: Path) -> Iterator[None]:
    """Turn "no space", "read-only" and "permission denied" into one sentence that names the target."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reasons |= {errno.EROFS: "the file system is read-only", errno.EACCES: "permission was denied"}
        if error.errno not in reasons:
            raise
        raise OSError(
            error.errno, f"Could not save `{target}`: {reasons[error.errno]}. What was saved there before is untouched."
        ) from error


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    Raises:
        OSError: the disk is full or not writable; the previous file at `path` survives.
    """
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            write(partial)
            # mkstemp files are private to the user; a published file gets the permissions of any new file.
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o666 & ~mask)
            _flush_to_disk(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _flush_to_disk(path.parent)


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON with sorted keys, durably."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8") and None)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then move it there; an older folder is replaced as a whole.

    Raises:
        OSError: the disk is full or not writable; the previous folder survives.
    """
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            write(partial)
            partial.chmod(0o755)
            for file in partial.iterdir():
                _flush_to_disk(file)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                path.rename(old / "content")
                partial.rename(path)
                shutil.rmtree(old)
            else:
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _flush_to_disk(path.parent)
