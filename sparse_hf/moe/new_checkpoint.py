"""How does a checkpoint that was made of another one reach its folder?"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from sparse_hf import __version__
from sparse_hf.moe.plan_upcycling import COMPANIONS, told_apart
from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.file_names import DESCRIPTION_FILE
from sparse_hf.storage.pieces import source_files
from sparse_hf.storage.shard_plan import PlannedShard, PlannedTensor, plan_digest, plan_shards
from sparse_hf.storage.shard_writer import JOURNAL_FILE, missing_shards, require_space, write_index, write_shards
from sparse_hf.storage.tensor_headers import INDEX_FILE


def write_checkpoint(
    source: Path,
    destination: Path,
    tensors: Sequence[PlannedTensor],
    config: Mapping[str, object],
    description: Mapping[str, object],
    max_shard_bytes: int,
    progress: bool,
) -> bool:
    """Write the planned tensors and what belongs to a model, the config last, so that half a folder never loads.

    Called again after a kill with the same plan it goes on; several processes may share the shards.

    Args:
        source: whose tokenizer and the like are copied.
        description: what `sparse_hf.json` says, beside digest and version.

    Returns:
        Whether the folder is complete; if not, other processes still write.

    Raises:
        ValueError: the destination is the source, or holds shards of another plan.
        FileExistsError: it holds something else.
        OSError: the disk is full, or too small (refused before the first byte).
    """
    shards = plan_shards(tensors, max_shard_bytes)
    files = {file for tensor in tensors for piece in tensor.pieces for file in source_files(piece)}
    entries = {name: value for name, value in config.items() if name != "transformers_version"}
    digest = plan_digest(shards, {"config": entries, "sources": told_apart(files)})
    if not write_weights(source, destination, shards, digest, progress):
        return False
    complete_folder(source, destination, config, {**description, "digest": digest})
    return True


def write_weights(
    source: Path, destination: Path, shards: Sequence[PlannedShard], digest: str, progress: bool
) -> bool:
    """Write the planned shards and their index, or what is left of them.

    Returns:
        Whether all are there; if not, other processes still write.

    Raises:
        ValueError, FileExistsError, OSError: see `write_checkpoint`.
    """
    _check_destination(source, destination, {shard.name for shard in shards})
    missing = set(missing_shards(destination, shards))
    require_space(destination, sum(shard.file_bytes() for shard in shards if shard.name in missing))
    total = sum(shard.file_bytes() for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        if write_shards(destination, shards, digest, bar.update):
            return False
    write_index(destination, shards)
    return True


def complete_folder(
    source: Path,
    destination: Path,
    config: Mapping[str, object],
    description: Mapping[str, object],
    code: Sequence[Path] = (),
) -> None:
    """What makes a folder with weights a model: the source's tokenizer and the like, `code`, and the config last."""
    for file in (*(source / name for name in COMPANIONS), *code):
        if file.is_file():
            shutil.copyfile(file, destination / file.name)
    write_json(destination / DESCRIPTION_FILE, {**description, "versions": {"sparse_hf": __version__}})
    write_json(destination / "config.json", dict(config))


def read_origin(folder: Path) -> dict[str, object]:
    """What `sparse_hf.json` says about how a mixture was made; nothing if it is not there or about something else.

    Returns:
        `source_type` and `target_type` (model types), and of `init`, where it has one, `granularity` (parts that each
        copy was cut into) and `shared_half`.

    Raises:
        ValueError: the file is damaged or hostile.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    init = field(content, "init", dict, path, {})
    found = {
        "source_type": field(content, "source_type", str, path),
        "target_type": field(content, "target_type", str, path),
        "init": {
            "granularity": field(init, "granularity", int, path, 1),
            "shared_half": field(init, "shared_half", bool, path, False),
        },
    }
    return {name: value for name, value in found.items() if value is not None}


def _check_destination(source: Path, destination: Path, shards: set[str]) -> None:
    if destination.resolve() == source.resolve():
        raise ValueError(f"The destination must be another folder than the source, got `{destination}`.")
    if (destination / "config.json").exists():
        raise FileExistsError(f"`{destination}` holds a model already. Choose another folder.")
    if destination.is_dir() and not (destination / JOURNAL_FILE).exists():
        known = {*shards, INDEX_FILE}
        names = sorted(entry.name for entry in destination.iterdir())
        others = [name for name in names if name.removesuffix(".partial").removesuffix(".lock") not in known]
        if others:
            raise FileExistsError(f"`{destination}` holds other files ({others[0]}). Choose a new folder.")
