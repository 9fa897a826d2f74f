"""A sparse model's folder without the zeros, and back."""

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.compressed_checkpoint import FORMAT, QUANT_METHOD, is_compressed
from sparse_hf.storage.compressed_writing import compress_weights, expand_weights
from sparse_hf.storage.durable import write_folder, write_json
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.storage.save_lock import only_saver
from sparse_hf.storage.tensor_headers import read_headers


CONFIG_FILE = "config.json"

# Beside the weights and the config these come along: text, tokenizers, pictures, code that the config names, masks.
# Pickles and the state of a training do not.
COMPANION_SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".py", ".png", ".svg", ""}
COMPANION_FILES = {MASKS_FILE, "sparse_units.safetensors"}
LEFT_BEHIND = {CONFIG_FILE, "trainer_state.json", "optimizer.json"}

# safetensors' names of floating-point dtypes -> the config's.
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_compressed(
    model_or_folder: PreTrainedModel | str | Path, path: str | Path, max_shard_size: str | int = "5GB"
) -> Path:
    """Save a sparse model without its zeros, for `AutoModel....from_pretrained(path)` where sparse_hf is imported.

    Every tensor comes back bit for bit, -0.0 and NaN included. Without sparse_hf the folder loads nowhere: no stock
    loader finds a file of weights in it. Killed at any moment, `path` holds what it held before or the new checkpoint.

    Args:
        model_or_folder: a model of Transformers, or the folder of a dense safetensors checkpoint, whose tokenizer,
            card and masks come along. A model is first saved densely to a temporary folder beside `path`.
        path: a new folder, or one that holds an older compressed checkpoint, which is replaced.
        max_shard_size: of the dense shards; each becomes one compressed file. Only for a model.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: the folder holds no dense safetensors checkpoint.
        FileExistsError: `path` holds something else, or another process is saving there.
        ValueError: the checkpoint is quantized, damaged or hostile.
        OSError: the disk is full or not writable; an older checkpoint survives.
    """
    if isinstance(model_or_folder, PreTrainedModel):

        def write(new: Path) -> None:
            dense = new.parent / "dense"
            model_or_folder.save_pretrained(dense, max_shard_size=max_shard_size)
            _compress_folder(dense, new)

        return _save(Path(path), write)
    source = _source_folder(model_or_folder, path)
    return _save(Path(path), lambda new: _compress_folder(source, new))


def save_dense(folder: str | Path, path: str | Path) -> Path:
    """Turn a compressed checkpoint back into a stock one with its zeros, tensor by tensor and without a model.

    Args:
        folder: what `save_compressed` wrote.
        path: a new folder.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: the folder holds no compressed checkpoint.
        FileExistsError: `path` is there and not empty, or another process is saving there.
        ValueError: the checkpoint is damaged or hostile.
        OSError: the disk is full, or too small.
    """
    source, path = _source_folder(folder, path), Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"`{path}` must be a new folder: choose another one.")
    with only_saver(path):
        write_folder(path, lambda new: _expand_folder(source, new))
    return path


def _save(path: Path, write: Callable[[Path], None]) -> Path:
    with only_saver(path):
        strangers = path.exists() and not (path.is_dir() and (is_compressed(path) or not any(path.iterdir())))
        if strangers or (path.is_dir() and any(entry.is_dir() for entry in path.iterdir())):
            raise FileExistsError(
                f"`{path}` must be new or hold nothing but an older compressed checkpoint. Choose another folder."
            )
        write_folder(path, write)
    return path


def _source_folder(folder: str | Path, path: str | Path) -> Path:
    source = Path(folder)
    if not source.is_dir():
        raise FileNotFoundError(
            f"`{folder}` is no folder. Pass a model, or the folder of a checkpoint; one from the Hub can be fetched "
            "with `huggingface_hub.snapshot_download`."
        )
    if source.resolve() == Path(path).resolve():
        raise ValueError(f"The new folder must be another one than the source, got `{path}`.")
    return source


def _compress_folder(source: Path, new: Path) -> None:
    config = read_json(source / CONFIG_FILE)
    found = field(config, "quantization_config", dict, source / CONFIG_FILE)
    if found is not None:
        raise ValueError(
            f"`{source}` is quantized or compressed already ({found.get('quant_method')!r}). Pass a plain checkpoint."
        )
    _copy_companions(source, new)
    weights = compress_weights(source, new)
    config.pop("transformers_weights", None)
    if not config.keys() & {"dtype", "torch_dtype"}:  # a loader would guess it from weights that it cannot read
        config["dtype"] = _first_dtype(source)
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT, "weights": weights}
    write_json(new / CONFIG_FILE, config)


def _expand_folder(source: Path, new: Path) -> None:
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
