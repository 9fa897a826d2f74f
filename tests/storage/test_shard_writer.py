"""Shards are what safetensors reads, and a kill, a full disk or a second process never costs more than one shard."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_hf.storage import piece_output
from sparse_hf.storage.pieces import CopyBytes, DrawNormal, FillZeros
from sparse_hf.storage.shard_plan import PlannedTensor, plan_shards
from sparse_hf.storage.shard_writer import (
    JOURNAL_FILE,
    missing_shards,
    require_space,
    write_index,
    write_shards,
)
from sparse_hf.storage.tensor_headers import read_headers


SOURCE = {
    "attention": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "norm": torch.arange(5.0),
    "codes": torch.arange(7, dtype=torch.int8),
}


@pytest.fixture
def source(tmp_path) -> dict:
    (tmp_path / "source").mkdir()
    save_file(SOURCE, tmp_path / "source" / "model.safetensors")
    return read_headers(tmp_path / "source")


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a few bytes take several writes."""
    monkeypatch.setattr(piece_output, "BLOCK_BYTES", 50)


def plan(source: dict, limit: int = 1000) -> list:
    stored = source.values()
    copies = [
        PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (CopyBytes(tensor.file, tensor.offset, tensor.length),))
        for tensor in stored
    ]
    whole = source["attention"]
    rows = [CopyBytes(whole.file, whole.offset + 8 * row, 8) for row in (4, 1)]
    stitched = PlannedTensor("rows", "BF16", (3, 4), (rows[0], FillZeros(8), rows[1]))
    router = PlannedTensor("router", "F32", (3, 5), (DrawNormal(15, 0.02, "F32", "layer 0"),))
    return plan_shards([*copies, stitched, router], limit)


def read(path: Path) -> bytes:
    return path.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, hidden ones too; not the folder that a killed `write_json` leaves."""
    files = (path for path in folder.iterdir() if path.is_file())
    return {path.name: read(path) for path in files if path.name != JOURNAL_FILE}


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / JOURNAL_FILE).read_text().splitlines()]


@pytest.mark.parametrize("limit", [1000, 60, 1])
def test_what_was_planned_is_what_safetensors_loads(tmp_path, source, small_blocks, limit):
    shards, out = plan(source, limit), tmp_path / "new" / "out"
    written = []
    assert write_shards(out, shards, "digest", written.append) == []
    write_index(out, shards)
    loaded = {}
    for shard in shards:
        loaded |= load_file(out / shard.name)
    for name, tensor in SOURCE.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    attention = SOURCE["attention"]
    assert torch.equal(loaded["rows"], torch.stack([attention[4], torch.zeros(4).bfloat16(), attention[1]]))
    assert 0 < loaded["router"].abs().max() < 0.1
    assert set(read_headers(out)) == set(loaded)
    assert sum(written) == sum(shard.file_bytes() for shard in shards) == sum(map(len, map(read, out.glob("*.saf*s"))))
    assert all(len(read(out / shard.name)) == shard.file_bytes() for shard in shards)
    index = {"model.safetensors.index.json"} if len(shards) > 1 else set()
    assert set(contents(out)) == {shard.name for shard in shards} | index


def test_the_journal_tells_the_size_of_every_shard(tmp_path, source, small_blocks):
    shards = plan(source, 60)
    write_shards(tmp_path / "out", shards, "digest")
    first, *lines = journal(tmp_path / "out")
    assert first == {"plan": "digest"}
    for shard, line in zip(shards, lines, strict=True):
        data = read(tmp_path / "out" / shard.name)
        assert line == {"shard": shard.name, "bytes": len(data)}


def test_the_index_comes_last(tmp_path, source):
    shards, out = plan(source, 60), tmp_path / "out"
    assert missing_shards(out, shards) == [shard.name for shard in shards]
    write_shards(out, shards, "digest")
    (out / shards[1].name).unlink()
    (out / shards[2].name).write_bytes(b"torn")
    assert missing_shards(out, shards) == [shards[1].name, shards[2].name]
    with pytest.raises(ValueError, match=f"2 of {len(shards)} are missing: {shards[1].name}"):
        write_index(out, shards)
    write_shards(out, shards, "digest")
    write_index(out, shards)
    index = json.loads(read(out / "model.safetensors.index.json"))
    assert index["metadata"] == {"total_size": sum(tensor.length for shard in shards for tensor in shard.tensors)}
    assert index["weight_map"]["router"] == shards[-1].name


def die_at(call: int) -> None:
    """Make the `call`-th change to the disk kill this process without warning, a write within its bytes."""
    calls = itertools.count()

    def deadly(change: Callable) -> Callable:
        def changed(*arguments: object, **options: object) -> object:
            if next(calls) == call:
                if change is write:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    write = os.write
    for name in ("write", "copy_file_range", "fsync", "replace", "unlink", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))


def in_child(run: Callable[[], object]) -> int:
    """The wait status of a forked process that runs `run`."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            run()
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1]


def test_a_kill_at_any_change_to_the_disk_is_resumed_to_the_same_bytes(tmp_path, source, monkeypatch):
    monkeypatch.setattr(piece_output, "BLOCK_BYTES", 300)
    monkeypatch.setattr(piece_output, "SYSTEM_COPY_BYTES", 40)
    shards, out = plan(source, 75), tmp_path / "out"
    write_shards(tmp_path / "whole", shards, "digest")
    write_index(tmp_path / "whole", shards)

    def run() -> None:
        write_shards(out, shards, "digest")
        write_index(out, shards)

    for call in itertools.count():
        status = in_child(lambda call=call: (die_at(call), run()))
        if status == 0:  # it finished before its time
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        finished = [path for path in before if path.name not in missing_shards(out, shards)]
        run()
        # Finished shards were left alone, and nothing temporary stays.
        assert all(path.stat().st_mtime_ns == before[path] for path in finished)
        assert contents(out) == contents(tmp_path / "whole")
        shutil.rmtree(out)
    assert call > 8 * len(shards) > 16


def test_a_torn_journal_line_costs_its_shard_only(tmp_path, source):
    shards, out = plan(source, 60), tmp_path / "out"
    write_shards(out, shards, "digest")
    text = read(out / JOURNAL_FILE)
    (out / JOURNAL_FILE).write_bytes(text[:-20])
    assert missing_shards(out, shards) == [shards[-1].name]
    write_shards(out, shards, "digest")
    assert missing_shards(out, shards) == []
    *_, torn, last = read(out / JOURNAL_FILE).splitlines()
    assert last + b"\n" == text[-len(last) - 1 :]
    assert last.startswith(torn)


def test_another_plan_and_files_of_others_are_refused(tmp_path, source):
    shards, out = plan(source, 60), tmp_path / "out"
    write_shards(out, shards, "digest")
    before = contents(out)
    with pytest.raises(ValueError, match="shards of another plan.* Choose an empty folder"):
        write_shards(out, shards, "other digest")
    assert contents(out) == before
    before = contents(tmp_path / "source")
    with pytest.raises(ValueError, match="must not hold `model.safetensors` of another program"):
        write_shards(tmp_path / "source", plan(source), "digest")
    assert contents(tmp_path / "source") == before
    assert not (tmp_path / "source" / JOURNAL_FILE).exists()


def test_a_full_disk_is_told_and_resumed(tmp_path, source, small_blocks, monkeypatch):
    shards, out = plan(source, 60), tmp_path / "out"
    left = iter(range(12))
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:20])  # a short write, as just before the disk is full

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="the disk is full. Finished shards are kept") as caught:
        write_shards(out, shards, "digest")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "write", write)
    assert 0 < len(missing_shards(out, shards)) <= len(shards)
    assert not list(out.glob("*.partial"))
    write_shards(out, shards, "digest")
    write_shards(tmp_path / "whole", shards, "digest")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_shrank_is_refused(tmp_path, source):
    shards = plan(source)
    os.truncate(source["norm"].file, source["norm"].offset + 4)
    with pytest.raises(ValueError, match="`.*model.safetensors` must have at least .* it was changed"):
        write_shards(tmp_path / "out", shards, "digest")
    assert missing_shards(tmp_path / "out", shards) == ["model.safetensors"]


def test_two_processes_share_the_shards(tmp_path, source):
    shards, out = plan(source, 1), tmp_path / "out"
    held, pending = threading.Event(), []

    def meanwhile(_: int) -> None:
        """Within the first shard of this process, let another one run to its end."""
        if not held.is_set():
            held.set()
            status = in_child(lambda: write_shards(out, shards, "digest") == [shards[0].name] or os._exit(7))
            pending.extend([status, missing_shards(out, shards)])

    assert write_shards(out, shards, "digest", meanwhile) == []
    assert pending == [0, [shards[0].name]]
    assert [line["shard"] for line in journal(out)[1:]] == [shard.name for shard in (*shards[1:], shards[0])]
    write_shards(tmp_path / "whole", shards, "digest")
    assert contents(out) == contents(tmp_path / "whole")


def test_too_little_space_is_told_before_the_first_byte(tmp_path):
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OSError, match="nothing was written") as caught:
        require_space(tmp_path / "not" / "there", 1 << 60)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
