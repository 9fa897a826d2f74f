"""A sparse model's folder without the zeros, and back."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from sparse_hf.storage.compressed_checkpoint import is_compressed
from sparse_hf.storage.compressed_folder import compress_folder, expand_folder
from sparse_hf.storage.durable import write_folder
from sparse_hf.storage.save_lock import only_saver


def save_compressed(
    model_or_folder: PreTrainedModel | str | Path,
    path: str | Path,
    max_shard_size: str | int = "5GB",
    zstd: bool = False,
) -> Path:
    """Save a sparse model without its zeros, for `AutoModel....from_pretrained(path)` where sparse_hf is imported.

    Every tensor comes back bit for bit, -0.0 and NaN included. Without sparse_hf the folder loads nowhere: no stock
    loader finds a file of weights in it. Killed at any moment, `path` holds what it held before or the new checkpoint.

    Args:
        model_or_folder: a model of Transformers, or the folder of a dense safetensors checkpoint, whose tokenizer,
            card and masks come along. A model is first saved densely to a temporary folder beside `path`.
        path: a new folder, or one that holds an older compressed checkpoint, which is replaced.
        max_shard_size: of the dense shards; each becomes one compressed file. Only for a model.
        zstd: code the values too, and what has no zeros: a third smaller in bf16, a sixth in fp32, and slower both
            ways. Whoever writes or reads it needs the package `zstandard`.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: the folder holds no dense safetensors checkpoint.
        FileExistsError: `path` holds something else, or another process is saving there.
        ValueError: the checkpoint is quantized, damaged or hostile.
        OSError: the disk is full or not writable; an older checkpoint survives.
        ImportError: `zstandard` is wanted and not installed.
    """
    if isinstance(model_or_folder, PreTrainedModel):

        def write(new: Path) -> None:
            dense = new.parent / "dense"
            model_or_folder.save_pretrained(dense, max_shard_size=max_shard_size)
            compress_folder(dense, new, zstd)

        return _save(Path(path), write)
    source = _source_folder(model_or_folder, path)
    return _save(Path(path), lambda new: compress_folder(source, new, zstd))


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
        write_folder(path, lambda new: expand_folder(source, new))
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
