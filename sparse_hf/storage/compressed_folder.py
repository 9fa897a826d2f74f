"""A sparse model's folder without the zeros, and back: what comes along with the weights, what the config says."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.compressed_checkpoint import FORMAT, QUANT_METHOD
from sparse_hf.storage.compressed_writing import compress_weights, expand_weights
from sparse_hf.storage.durable import clear_disk_errors, write_json
from sparse_hf.storage.file_names import CONFIG_FILE, UNITS_FILE
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.storage.tensor_headers import read_headers
from sparse_hf.storage.value_coding import check_zstd


# Beside the weights and the config these come along: text, tokenizers, pictures, code that the config names, masks.
# Pickles and the state of a training do not.
COMPANION_SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".py", ".png", ".svg", ""}
COMPANION_FILES = {MASKS_FILE, UNITS_FILE}
LEFT_BEHIND = {CONFIG_FILE, "trainer_state.json", "optimizer.json"}

# safetensors' names of floating-point dtypes -> the config's.
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def compress_folder(source: Path, new: Path, zstd: bool = False) -> None:
    """Write the dense checkpoint in `source`, with what belongs to it, to `new` without its zeros.

    Args:
        new: an existing, empty folder.
        zstd: code the values too.

    Raises:
        ImportError: `zstandard` is wanted and not installed.
        FileNotFoundError: the folder holds no dense safetensors checkpoint with a config.
        ValueError: it is quantized, compressed already, damaged or hostile.
        OSError: the disk is full or not writable.
    """
    if zstd:
        check_zstd()
    if not (source / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"`{source}` must hold a model in safetensors and its `{CONFIG_FILE}`, which is not there. Tickets and "
            "adapters are not compressed: they are small as they are."
        )
    config = read_json(source / CONFIG_FILE)
    found = field(config, "quantization_config", dict, source / CONFIG_FILE)
    if found is not None:
        raise ValueError(
            f"`{source}` is quantized or compressed already ({found.get('quant_method')!r}). Pass a plain checkpoint."
        )
    _copy_companions(source, new)
    weights = compress_weights(source, new, zstd)
    config.pop("transformers_weights", None)
    if not config.keys() & {"dtype", "torch_dtype"}:  # a loader would guess it from weights that it cannot read
        config["dtype"] = _first_dtype(source)
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT, "weights": weights}
    write_json(new / CONFIG_FILE, config)


@contextlib.contextmanager
def compressed_copy(source: Path, zstd: bool = False) -> Iterator[Path]:
    """`compress_folder` into a temporary folder, which is gone afterwards.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: as `compress_folder`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with clear_disk_errors(Path(scratch)):
            compress_folder(source, Path(scratch), zstd)
        yield Path(scratch)


def expand_folder(source: Path, new: Path) -> None:
    """Undo `compress_folder`.

    Raises:
        FileNotFoundError: the folder holds no compressed checkpoint.
        ValueError: it is damaged or hostile.
        OSError: the disk is full, or too small.
    """
    config = read_json(source / CONFIG_FILE)
    config.pop("quantization_config", None)
    _copy_companions(source, new)
    expand_weights(source, new)
    write_json(new / CONFIG_FILE, config)


def _first_dtype(source: Path) -> str:
    dtypes = [tensor.dtype for tensor in read_headers(source).values()]
    return next((CONFIG_DTYPES[dtype] for dtype in dtypes if dtype in CONFIG_DTYPES), "float32")


def _copy_companions(source: Path, new: Path) -> None:
    for file in sorted(source.iterdir()):
        if not _is_companion(file):
            continue
        if not _stays_inside(file, source):
            raise ValueError(f"`{file}` links to a file outside the checkpoint, which might be private. Remove it.")
        shutil.copyfile(file, new / file.name)


def _is_companion(file: Path) -> bool:
    if not file.is_file() or file.name in LEFT_BEHIND or file.name.startswith("."):
        return False
    return file.name in COMPANION_FILES or (
        file.suffix in COMPANION_SUFFIXES and not file.name.endswith(".index.json")
    )


def _stays_inside(file: Path, source: Path) -> bool:
    """Whether a link, if it is one, leads into the folder itself or, in the Hub's cache, to the repository's blobs."""
    folder, target = source.resolve(), file.resolve()
    return target.parent in (folder, folder.parent.parent / "blobs")
