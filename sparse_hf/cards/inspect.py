"""What is sparse in a folder or a repository? Read off descriptions, masks and headers; no model is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from sparse_hf.cards.compressed import compressed_facts
from sparse_hf.cards.descriptions import (
    adapter_facts,
    architecture_of,
    count,
    mixture_facts,
    numbers,
    read_if_there,
)
from sparse_hf.cards.folder_zeros import counted_zeros, kept_units, masked_zeros
from sparse_hf.cards.inspection import NOTICEABLE, AdapterFacts, Inspection, Kind, UnitsKept
from sparse_hf.cards.layers import MatrixZeros
from sparse_hf.storage.checked_json import field
from sparse_hf.storage.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE, DESCRIPTION_FILE, UNITS_FILE
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.mask_file import MASKS_FILE
from sparse_hf.storage.tensor_headers import INDEX_FILE, SINGLE_FILE, StoredTensor, read_header, read_headers


ADAPTER_FILE = "adapter_model.safetensors"
DSEE = "SPARSE_HF_DSEE"  # the name PEFT knows our method by
SMALL_FILES = (DESCRIPTION_FILE, MASKS_FILE, UNITS_FILE, CONFIG_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE)


def inspect(
    name_or_path: str | Path,
    count_zeros: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Inspection:
    """Tell what is sparse in a folder or a Hub repository, without loading weights into a model.

    Masks, descriptions and headers say it. Where there are no masks the stored weights can be read, in blocks of a few
    MiB, and their exact zeros counted.

    Args:
        name_or_path: the folder of a model, a ticket or an adapter, or a Hub id.
        count_zeros: whether to read weights that no masks tell about. By default those in a folder are, and those of a
            repository are not downloaded.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: no such folder or repository, or nothing that we know is in it.
        ValueError: a file is truncated, damaged or hostile.
    """
    local = Path(name_or_path).is_dir()
    read_weights = local if count_zeros is None else count_zeros
    wanted = [*SMALL_FILES, *((INDEX_FILE, "model*.safetensors", "compressed*") if read_weights else ())]
    folder = local_folder(name_or_path, wanted, revision, token, cache_dir)
    sizes = file_sizes(folder) if local else _remote_sizes(str(name_or_path), revision, token)
    return _inspect_folder(str(name_or_path), folder, sizes or file_sizes(folder), read_weights)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files in a folder, by name; subfolders are left out."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _remote_sizes(repo_id: str, revision: str | None, token: str | bool | None) -> dict[str, int]:
    """The same of a repository; nothing if it can only be read from the cache."""
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return {}
    return {one.rfilename: one.size or 0 for one in info.siblings or [] if "/" not in one.rfilename}


@dataclass(frozen=True)
class _Found:
    """What the files of a folder hold."""

    description: dict
    config: dict
    weights: Mapping[str, StoredTensor]
    masks: tuple[MatrixZeros, ...] | None
    units: tuple[UnitsKept, ...]
    adapter: AdapterFacts | None


def _inspect_folder(name: str, folder: Path, files: dict[str, int], read_weights: bool) -> Inspection:
    description = read_if_there(folder / DESCRIPTION_FILE)
    config = read_if_there(folder / CONFIG_FILE)
    adapter_config = read_if_there(folder / ADAPTER_CONFIG_FILE)
    stored_adapter = read_header(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else {}
    weights = _stored_weights(folder)
    adapter = adapter_facts(adapter_config, stored_adapter, folder / ADAPTER_CONFIG_FILE)
    masks = masked_zeros(folder, stored_adapter)
    units = kept_units(folder, description, config)
    found = _Found(description, config, weights, masks, units, adapter)
    mixture = mixture_facts(config, description, dict(weights), folder)
    if not (description or config or adapter or masks or units or weights):
        raise FileNotFoundError(
            f"`{name}` must hold a model in safetensors, a ticket or an adapter, found none of {SINGLE_FILE}, "
            f"{INDEX_FILE}, {', '.join(SMALL_FILES)}."
        )
    matrices, counted = masks or (), "masks" if masks else None
    compressed = compressed_facts(config, folder)
    if masks is None and compressed is not None:
        matrices, counted = compressed.matrices, "heads" if compressed.matrices else None
    elif masks is None and read_weights and weights:
        matrices, counted = counted_zeros(weights), "weights"
    path = folder / DESCRIPTION_FILE
    zeros, entries = sum(one.zeros for one in matrices), sum(one.weights for one in matrices)
    sparse = bool(masks) or (entries > 0 and zeros >= NOTICEABLE * entries)
    return Inspection(
        name=name,
        kind=_kind(found, sparse, mixture is not None, compressed is not None, files),
        method=field(description, "method", str, path),
        config=field(description, "config", dict, path, {}),
        base_model=_base_model(description, adapter_config, folder),
        base_revision=field(description, "base_revision", str, path),
        model_type=field(config, "model_type", str, folder / CONFIG_FILE)
        or field(description, "model_type", str, path),
        architecture=architecture_of(config),
        stock="auto_map" not in config,
        parameters=_parameters(weights, description, path) or (compressed and compressed.parameters),
        metrics=numbers(description, path),
        matrices=matrices,
        counted=counted,
        units=units,
        mixture=mixture,
        adapter=adapter,
        compression={} if compressed is None else compressed.facts,
        files=files,
    )


def _stored_weights(folder: Path) -> Mapping[str, StoredTensor]:
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return {}
    return read_headers(folder)


def _kind(found: _Found, sparse: bool, mixture: bool, compressed: bool, files: Mapping[str, int]) -> Kind:
    """The name of what was found; where several fit, the one that says most about how it is loaded."""
    said = found.description.get("kind")
    model_type = found.config.get("model_type")
    has_weights = SINGLE_FILE in files or INDEX_FILE in files
    if compressed:
        return "compressed_model"
    if found.adapter is not None:
        return "dsee_adapter" if found.adapter.peft_type == DSEE else "adapter"
    if UNITS_FILE in files or said == "structured_ticket":
        return "structured_ticket"
    if said == "ticket" or (found.masks is not None and not found.config and not has_weights):
        return "ticket"
    if said == "slim_model" or (isinstance(model_type, str) and model_type.startswith("slim_")):
        return "slim_model"
    if mixture:
        return "mixture"
    return "sparse_model" if sparse else "model"


def _base_model(description: dict, adapter_config: dict, folder: Path) -> str | None:
    said = field(description, "base_model", str, folder / DESCRIPTION_FILE)
    return said or field(adapter_config, "base_model_name_or_path", str, folder / ADAPTER_CONFIG_FILE)


def _parameters(weights: Mapping[str, StoredTensor], description: dict, path: Path) -> int | None:
    if recorded := count(description, "model_parameters", path):
        return recorded
    return sum(math.prod(tensor.shape) for tensor in weights.values()) or None
