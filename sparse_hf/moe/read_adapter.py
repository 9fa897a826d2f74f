"""What does a LoRA adapter that PEFT saved add to which weights?

PEFT packs the factors of a parameter of shape (experts, rows, columns) into two matrices: A of shape (experts x rank,
columns), an expert's rows together, and B of shape (rows, rank x experts), an expert's columns `experts` apart.
"""

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.pieces import CopyBytes, Term, WeightedSum
from sparse_hf.storage.shard_plan import PlannedTensor, plan_shards
from sparse_hf.storage.shard_writer import write_shards
from sparse_hf.storage.tensor_headers import SINGLE_FILE, StoredTensor, read_header


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight")
# Entries of PEFT's config that do not change what the stored factors add, or that are read here.
KNOWN = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "bias"),
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
}
# Others change the base's weights when training begins.
INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LowRank:
    """`left` B and `right` A, as PEFT packs them."""

    left: StoredTensor
    right: StoredTensor


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; no weights are held.

    Attributes:
        base: name of the model that it was trained on.
        record: how that was upcycled, see `load_with_shared_experts`.
        scale: of B A.
        factors: by the module's name in memory; a module with two adapted parameters has two.
        whole: weights that were trained themselves, by their names in memory.
    """

    folder: Path
    base: str
    record: Mapping[str, object]
    rank: int
    scale: float
    factors: Mapping[str, tuple[LowRank, ...]]
    whole: Mapping[str, StoredTensor]


def read_adapter(folder: Path) -> Adapter:
    """Read the config and the header of an adapter.

    Raises:
        FileNotFoundError: `adapter_config.json` or `adapter_model.safetensors` is missing.
        ValueError: it is no plain LoRA, or not of a model of `load_with_shared_experts`.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    _require_plain(config, path)
    rank, alpha = field(config, "r", int, path, 0), config.get("lora_alpha")
    if rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"`r` and `lora_alpha` in `{path}` must be numbers, got {rank!r} and {alpha!r}.")
    factors, whole = _sorted_tensors(read_header(folder / WEIGHTS_FILE))
    return Adapter(
        folder=folder,
        base=field(config, "base_model_name_or_path", str, path, "a model without a name"),
        record=_record(config, path),
        rank=rank,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        factors=factors,
        whole=whole,
    )


@contextlib.contextmanager
def float32_factors(adapter: Adapter, place: Path) -> Iterator[Adapter]:
    """The adapter with its factors in float32, in a temporary file in the folder `place` where they are not yet.

    Raises:
        ValueError: factors in a dtype that is not computed with.
    """
    every = [one for factors in adapter.factors.values() for pair in factors for one in (pair.left, pair.right)]
    if all(one.dtype == "F32" for one in every):
        yield adapter
        return
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".factors-", dir=place) as folder:
        planned = [PlannedTensor(one.name, "F32", one.shape, (as_dtype(one, "F32"),)) for one in every]
        write_shards(Path(folder), plan_shards(planned, max_shard_bytes=1 << 60), "factors")
        file = Path(folder) / "float32_factors.safetensors"
        (Path(folder) / SINGLE_FILE).rename(file)
        changed = (adapter.folder / WEIGHTS_FILE).stat().st_mtime_ns
        os.utime(file, ns=(changed, changed))  # so that the same export made again is known as the same
        found = read_header(file)
        factors = {
            module: tuple(LowRank(found[one.left.name], found[one.right.name]) for one in several)
            for module, several in adapter.factors.items()
        }
        yield replace(adapter, factors=factors)


def as_dtype(stored: StoredTensor, dtype: str) -> CopyBytes | WeightedSum:
    """The numbers of a stored tensor, rounded if need be."""
    piece = CopyBytes(stored.file, stored.offset, stored.length)
    return piece if stored.dtype == dtype else WeightedSum((Term(1.0, piece, stored.dtype),), dtype)


def _require_plain(config: Mapping[str, object], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"`{path}` must be of a LoRA adapter, got {config.get('peft_type')!r}: only those are merged."
        )
    if config.get("init_lora_weights", True) not in INITS:
        raise ValueError(
            f"`init_lora_weights` in `{path}` must be one of {', '.join(map(str, INITS))}, got "
            f"{config['init_lora_weights']!r}, which changes the base model: convert the adapter with PEFT first."
        )
    unknown = {name: value for name, value in config.items() if name not in KNOWN and value}
    if config.get("bias", "none") != "none":
        unknown["bias"] = config["bias"]
    if unknown:
        name = min(unknown)
        raise ValueError(
            f"`{name}` in `{path}` must be off for the adapter to be merged, got {unknown[name]!r:.80}: only "
            "W + scaling B A is known here."
        )


def _record(config: Mapping[str, object], path: Path) -> dict[str, object]:
    record = field(field(config, "auto_mapping", dict, path, {}), "sparse_hf", dict, path)
    kinds = {"experts": int, "top_k": int, "router_std": float, "seed": int, "target": str, "base": str}
    if record is None or any(name not in record for name in kinds):
        raise ValueError(
            f"`auto_mapping` in `{path}` must say how the base was upcycled, which "
            "`LoraConfig(..., **expert_lora_targets(model))` sees to."
        )
    layers = field(record, "layers", list, path)
    return {name: field(record, name, kind, path) for name, kind in kinds.items()} | {"layers": layers}


def _sorted_tensors(
    found: Mapping[str, StoredTensor],
) -> tuple[dict[str, tuple[LowRank, ...]], dict[str, StoredTensor]]:
    """Pairs of factors by module, and whole weights.

    Raises:
        ValueError: a tensor of another kind, or a factor alone.
    """
    pairs: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    whole = {}
    for name, stored in found.items():
        match = FACTOR.fullmatch(name)
        if not name.startswith(PREFIX) or (not match and "lora_" in name) or (match and len(stored.shape) != 2):
            raise ValueError(f"An adapter of linear layers and experts is needed, but it holds `{name}`.")
        if match:
            pairs.setdefault((match[1].removeprefix(PREFIX), match[2]), {})[match[3]] = stored
        elif not name.endswith(".base_layer.weight"):  # PEFT saves the frozen weight of an adapted embedding too
            whole[name.removeprefix(PREFIX)] = stored
    factors: dict[str, tuple[LowRank, ...]] = {}
    for (module, levels), pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"`{module}{levels}` must have both factors, got lora_{min(pair)} alone.")
        factors[module] = (*factors.get(module, ()), LowRank(pair["B"], pair["A"]))
    return factors, whole
