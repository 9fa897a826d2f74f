"""How do planned shards reach the disk so that a kill at any moment costs at most one shard?

Bytes go to `<shard>.partial`, then to the disk, then under their name, then into the journal: one line per finished
shard, the digest of the plan in the first. Shards are independent, so several processes may share them.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sparse_hf.storage.durable import DISK_ERRORS, write_json
from sparse_hf.storage.piece_bytes import SourceFiles
from sparse_hf.storage.piece_output import PieceOutput, write_all
from sparse_hf.storage.pieces import source_files
from sparse_hf.storage.shard_plan import PlannedShard
from sparse_hf.storage.tensor_headers import INDEX_FILE


JOURNAL_FILE = "upcycle_journal.jsonl"


def write_shards(
    folder: Path, shards: Sequence[PlannedShard], digest: str, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Write every shard that is neither finished nor being written by another process, in constant memory.

    Args:
        folder: made if it does not exist.
        digest: of the plan, see `plan_digest`; the same digest resumes what an earlier run left.
        progress: told the bytes of each block written, and of each shard found finished.

    Returns:
        The shards that other processes were writing; `missing_shards` tells later whether they finished.

    Raises:
        ValueError: the folder holds shards of another plan or of another program, or a source file is too short.
        OSError: the disk is full or not writable; finished shards stay, the same call resumes.
    """
    progress = progress or (lambda written: None)
    with _clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _open_journal(folder, shards, digest)
    elsewhere = []
    for shard in shards:
        with _shard_lock(folder, shard) as ours:
            if not ours:
                elsewhere.append(shard.name)
            elif _is_finished(folder, shard, _journal_lines(folder)):
                progress(shard.file_bytes())
            else:
                _write_shard(folder, shard, progress)
    return elsewhere


def missing_shards(folder: Path, shards: Sequence[PlannedShard]) -> list[str]:
    """The names of the shards that are not finished: not in the journal, not there, or of another size."""
    lines = _journal_lines(folder)
    return [shard.name for shard in shards if not _is_finished(folder, shard, lines)]


def write_index(folder: Path, shards: Sequence[PlannedShard]) -> None:
    """Write `model.safetensors.index.json`, durably, once all shards are finished; one shard alone needs none.

    Raises:
        ValueError: shards are missing.
        OSError: the disk is full or not writable.
    """
    if missing := missing_shards(folder, shards):
        raise ValueError(
            f"The index must be written after all shards, {len(missing)} of {len(shards)} are missing: "
            f"{', '.join(missing[:3])} ... Call `write_shards` again."
        )
    for shard in shards:  # a process killed between its journal line and here left its lock behind
        _lock_file(folder, shard).unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        total = sum(tensor.length for shard in shards for tensor in shard.tensors)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def require_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder`, which need not exist yet, has `needed` bytes free.

    Raises:
        OSError: it has not (ENOSPC); nothing was written.
    """
    free = free_bytes(folder)
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"Writing to `{folder}` takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Free some space or choose another disk; nothing was written.",
        )


def _write_shard(folder: Path, shard: PlannedShard, progress: Callable[[int], None]) -> None:
    path, partial = folder / shard.name, folder / f"{shard.name}.partial"
    with contextlib.ExitStack() as cleanup:
        sources = cleanup.enter_context(SourceFiles())
        pieces = [piece for tensor in shard.tensors for piece in tensor.pieces]
        for file in dict.fromkeys(file for piece in pieces for file in source_files(piece)):
            sources.descriptor(file)  # opened here, so that a source that is gone is not taken for a full disk
        cleanup.enter_context(_clear_disk_errors(path))
        output = PieceOutput(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), sources, progress)
        cleanup.callback(partial.unlink, missing_ok=True)
        cleanup.callback(os.close, output.descriptor)
        output.append(shard.header())
        for piece in pieces:
            output.write(piece)
        output.flush()
        os.fsync(output.descriptor)
        os.replace(partial, path)
        _flush_folder(folder)
        _append_line(folder, {"shard": shard.name, "bytes": output.written})


def _lock_file(folder: Path, shard: PlannedShard) -> Path:
    return folder / f".{shard.name}.lock"


@contextlib.contextmanager
def _shard_lock(folder: Path, shard: PlannedShard) -> Iterator[bool]:
    """Whether this process may write the shard; the system frees the lock of a killed process."""
    path = _lock_file(folder, shard)
    with _clear_disk_errors(folder):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have removed the file between our two calls; a lock on it binds nobody.
            ours = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open_journal(folder: Path, shards: Sequence[PlannedShard], digest: str) -> None:
    """Begin the journal, or check that the one in `folder` belongs to the same plan."""
    journal = folder / JOURNAL_FILE
    taken = [name for name in (INDEX_FILE, *(shard.name for shard in shards)) if (folder / name).exists()]
    begun = journal.is_file() and b"\n" in journal.read_bytes()  # looked at after `taken`: a shard follows a journal
    if taken and not begun:
        raise ValueError(
            f"`{folder}` must not hold `{taken[0]}` of another program, which would be overwritten. "
            "Choose an empty folder."
        )
    with _locked_journal(folder) as descriptor:
        first, newline, _ = journal.read_bytes().partition(b"\n")
        if not newline:  # new, or its first line was torn before any shard could be finished
            os.ftruncate(descriptor, 0)
            _write_line(descriptor, {"plan": digest})
            _flush_folder(folder)
        elif _parsed(first).get("plan") != digest:
            raise ValueError(
                f"`{folder}` holds shards of another plan: other sources, options or library versions. "
                "Choose an empty folder, or delete this one to start again."
            )


def _append_line(folder: Path, line: dict) -> None:
    with _locked_journal(folder) as descriptor:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, 1, size - 1) != b"\n":  # another process was killed within its line
            write_all(descriptor, memoryview(b"\n"))
        _write_line(descriptor, line)


def _write_line(descriptor: int, line: dict) -> None:
    write_all(descriptor, memoryview(json.dumps(line).encode() + b"\n"))
    os.fsync(descriptor)


@contextlib.contextmanager
def _locked_journal(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder / JOURNAL_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for one line, so waiting is short
        yield descriptor
    finally:
        os.close(descriptor)


def _journal_lines(folder: Path) -> dict[str, int]:
    """The bytes of every shard in the journal; torn lines count as not written."""
    journal = folder / JOURNAL_FILE
    if not journal.is_file():
        return {}
    lines = [_parsed(line) for line in journal.read_bytes().split(b"\n")]
    return {line["shard"]: line.get("bytes") for line in lines if isinstance(line.get("shard"), str)}


def _parsed(line: bytes) -> dict:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_finished(folder: Path, shard: PlannedShard, lines: dict[str, int]) -> bool:
    path = folder / shard.name
    return shard.name in lines and path.is_file() and path.stat().st_size == lines[shard.name] == shard.file_bytes()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _clear_disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise OSError(
            error.errno,
            f"Could not write `{target}`: {DISK_ERRORS[error.errno]}. Finished shards are kept; make room or change "
            "the permissions, then run the same again.",
        ) from error
