"""How is a checkpoint without its zeros made from a dense one, and turned back?

One tensor at a time is in memory, in both directions.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sparse_hf.storage.compressed_checkpoint import COMPRESSED_FILE, COMPRESSED_INDEX, form_of, forms_of, in_file
from sparse_hf.storage.compressed_tensor import compress_tensor, expand_tensor
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.piece_bytes import SourceFiles, too_short
from sparse_hf.storage.safetensors_output import SafetensorsOutput
from sparse_hf.storage.shard_writer import require_space
from sparse_hf.storage.tensor_headers import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, StoredTensor, read_headers


COPIED_BYTES = 16 << 20  # at a time

Write = Callable[[SourceFiles, SafetensorsOutput, list[StoredTensor]], None]


def compress_weights(source: Path, destination: Path, zstd: bool = False) -> str:
    """Write the safetensors checkpoint in `source` without its zeros; one file for each of its files.

    Args:
        destination: an existing folder.
        zstd: code the values too.

    Returns:
        The name of the file to load: the only one or the index.

    Raises:
        FileNotFoundError, ValueError: the source is not there, or truncated, damaged or hostile.
        OSError: the disk is full or not writable.
    """
    tensors = read_headers(source)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write = functools.partial(_write_compressed, zstd=zstd)
    return _rewrite(tensors, shapes, destination, (COMPRESSED_FILE, COMPRESSED_INDEX), write)


def expand_weights(source: Path, destination: Path) -> str:
    """Write the compressed checkpoint in `source` as a stock one, with its zeros: every tensor bit for bit as it was.

    Args:
        destination: an existing folder.

    Returns:
        The name of the file to load: the only one or the index.

    Raises:
        FileNotFoundError, ValueError: the source is not there, or truncated, damaged or hostile.
        OSError: the disk is full, or too small (refused before the first byte).
    """
    tensors = read_headers(source, COMPRESSED_FILE, COMPRESSED_INDEX)
    forms = forms_of(tensors.values())
    require_space(destination, sum(form.dense_bytes for form in forms.values()))
    shapes = {name: form.shape for name, form in forms.items()}
    return _rewrite(tensors, shapes, destination, (SINGLE_FILE, INDEX_FILE), _write_expanded)


def read_bytes(tensor: StoredTensor, sources: SourceFiles) -> np.ndarray:
    """The tensor's bytes (uint8, 1-D).

    Raises:
        ValueError: the file ends before.
    """
    data = np.empty(tensor.length, np.uint8)
    descriptor, done = sources.descriptor(tensor.file), 0
    while done < tensor.length:
        count = os.preadv(descriptor, [memoryview(data)[done:]], tensor.offset + done)
        if count == 0:
            raise too_short(tensor.file, tensor.offset + tensor.length, tensor.offset + done)
        done += count
    return data


def _rewrite(
    tensors: dict[str, StoredTensor],
    shapes: dict[str, tuple[int, ...]],
    destination: Path,
    names: tuple[str, str],
    write: Write,
) -> str:
    """A new file for each old one, and the index if there are several; returns the name of the file to load."""
    single, index = names
    files: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors.values():
        files.setdefault(tensor.file, []).append(tensor)
    stem, suffix = single.split(".")
    weight_map, total = {}, 0
    for number, group in enumerate(files.values(), 1):
        name = single if len(files) == 1 else f"{stem}-{number:05d}-of-{len(files):05d}.{suffix}"
        announced = {tensor.name: shapes[tensor.name] for tensor in group}
        with SourceFiles() as sources, SafetensorsOutput(destination / name, announced) as output:
            write(sources, output, group)
            output.finish()
        weight_map |= dict.fromkeys(announced, name)
        total += (destination / name).stat().st_size
    if len(files) == 1:
        return single
    write_json(destination / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return index


def _write_compressed(sources: SourceFiles, output: SafetensorsOutput, group: list[StoredTensor], zstd: bool) -> None:
    """Compressed ones first, multiples of 8 bytes long; then the dense, so that each lies as readers need it."""
    dense = []
    for tensor in group:
        data = read_bytes(tensor, sources)
        parts = compress_tensor(data, tensor.dtype, tensor.shape, zstd)
        if parts is None:
            dense.append(tensor)
        else:
            output.append(tensor.name, "U8", (sum(map(len, parts)),), parts)
    for tensor in _widest_first(dense):
        output.append(tensor.name, tensor.dtype, tensor.shape, _blocks(tensor, sources))


def _write_expanded(sources: SourceFiles, output: SafetensorsOutput, group: list[StoredTensor]) -> None:
    forms = {tensor.name: form_of(tensor, sources) for tensor in group}
    for tensor in sorted(group, key=lambda one: -DTYPE_BITS[forms[one.name].dtype]):
        form = forms[tensor.name]
        if form.form == "dense":
            output.append(tensor.name, tensor.dtype, tensor.shape, _blocks(tensor, sources))
            continue
        try:
            data, _ = expand_tensor(read_bytes(tensor, sources))
        except ValueError as error:
            raise in_file(tensor, error) from error
        output.append(tensor.name, form.dtype, form.shape, [data])


def _widest_first(tensors: list[StoredTensor]) -> list[StoredTensor]:
    return sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])


def _blocks(tensor: StoredTensor, sources: SourceFiles) -> Iterator[np.ndarray]:
    for start in range(0, tensor.length, COPIED_BYTES):
        count = min(COPIED_BYTES, tensor.length - start)
        yield np.frombuffer(sources.read(tensor.file, tensor.offset + start, count), np.uint8)
