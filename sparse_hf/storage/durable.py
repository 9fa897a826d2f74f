"""How is a file written so that a crash leaves the old one or the new one, never half of one?"""

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from sparse_hf.storage.folder_swap import swapped


DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission was denied",
}


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    Raises:
        OSError: the disk is full or not writable; the previous file at `path` survives.
    """
    with clear_disk_errors(path), _scratch_beside(path) as scratch:
        partial = scratch / path.name
        partial.touch()
        permissions = partial.stat().st_mode  # of any new file; safetensors would make it private to the user
        write(partial)
        partial.chmod(permissions)
        _flush_to_disk(partial)
        partial.replace(path)
        _flush_to_disk(path.parent)


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON with sorted keys, durably. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_without_infinities(content), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8") and None)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then move it there; an older folder is replaced as a whole.

    Where the system cannot swap two folders in one step (not Linux, some network file systems), a kill in the instant
    between two renames leaves the old one whole as `.<name>.*.partial/old` beside `path`.

    Raises:
        OSError: the disk is full or not writable; the previous folder survives.
    """
    path = path.resolve()  # a link to a folder stays a link
    with clear_disk_errors(path), _scratch_beside(path) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        write(new)
        for entry in [*new.rglob("*"), new]:
            _flush_to_disk(entry)
        if not (path.exists() and swapped(new, path)):
            _replace_folder(new, path, old)
        _flush_to_disk(path.parent)


def _replace_folder(new: Path, path: Path, old: Path) -> None:
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)


@contextlib.contextmanager
def clear_disk_errors(target: Path) -> Iterator[None]:
    """Turn "no space", "read-only" and "permission denied" into one sentence that names the target."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's error number only in its text.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number not in DISK_ERRORS:
            raise
        raise OSError(
            number, f"Could not save `{target}`: {DISK_ERRORS[number]}. What was saved there before is untouched."
        ) from error


@contextlib.contextmanager
def _scratch_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `path`; whatever is left in it goes, safetensors' own files too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as scratch:
        yield Path(scratch)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_infinities(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
