"""What do the JSON files of a model folder say? Each field is checked; nothing else of them is used."""

import math
import reprlib
from pathlib import Path

from sparse_hf.cards.inspection import AdapterFacts, MixtureFacts, UnitsKept
from sparse_hf.cards.layers import place
from sparse_hf.storage.checked_json import field, read_json
from sparse_hf.storage.file_names import CONFIG_FILE, DESCRIPTION_FILE
from sparse_hf.storage.tensor_headers import StoredTensor


MOST_ENTRIES = 1 << 16  # of a list in a description; a model has at most hundreds of layers
MOST_THINGS = 2**50
LARGEST_METRIC = 1e300
EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")
CONVERSIONS = ("upcycled_model", "thinned_mixture", "merged_mixture")


def read_if_there(path: Path) -> dict:
    """The JSON object in a file; empty if there is no such file.

    Raises:
        ValueError: damaged or hostile.
    """
    return read_json(path) if path.is_file() else {}


def count(content: dict, name: str, path: Path) -> int | None:
    """A number of things in a model; None if it is not recorded.

    Raises:
        ValueError: no whole number, negative, or more than any model has.
    """
    value = field(content, name, int, path)
    if value is not None and not 0 <= value <= MOST_THINGS:
        raise ValueError(f"`{name}` in `{path}` must be in [0, 2**50], got {reprlib.repr(value)}. It is damaged.")
    return value


def numbers(content: dict, path: Path, name: str = "metrics") -> dict[str, float]:
    """The finite numbers of an object, by name."""
    found = field(content, name, dict, path, {})
    return {
        key: value
        for key, value in list(found.items())[:MOST_ENTRIES]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_METRIC
    }


def architecture_of(config: dict) -> str | None:
    """The model's class, if the config names one."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() and len(first) <= 200 else None


def described_units(description: dict, path: Path) -> tuple[UnitsKept, ...]:
    """The heads and neurons of the layers in a description of a structured ticket or a slim model.

    Raises:
        ValueError: not of the form that we write.
    """
    found = []
    for entry in field(description, "layers", list, path, [])[:MOST_ENTRIES]:
        if not isinstance(entry, dict):
            raise ValueError(f"The `layers` in `{path}` must be objects. The file is damaged or hostile.")
        layer = field(entry, "layer", str, path, "")
        for kind in ("heads", "neurons"):
            kept, units = (count(entry, name, path) for name in (f"kept_{kind}", kind))
            if kept is not None and kept <= (kept if units is None else units):
                found.append(UnitsKept(layer, kind, kept, units))
    return tuple(found)


def slim_units(config: dict, path: Path) -> tuple[UnitsKept, ...]:
    """The heads and neurons that the config of a slim model counts."""
    kept = field(field(config, "slim", dict, path, {}), "kept", dict, path, {})
    found = []
    for key in list(kept)[:MOST_ENTRIES]:
        layer, _, kind = key.rpartition(".")
        found.append(UnitsKept(layer, kind, count(kept, key, path) or 0, None))
    return tuple(found)


def mixture_facts(
    config: dict, description: dict, stored: dict[str, StoredTensor], folder: Path
) -> MixtureFacts | None:
    """What is known about the experts; None for a dense model."""
    path = folder / CONFIG_FILE
    counts = [count(config, name, path) for name in EXPERT_COUNTS]
    experts = next((one for one in counts if one is not None and one > 1), None)
    if experts is None:
        return None
    said = folder / DESCRIPTION_FILE
    kind = field(description, "kind", str, said)
    difference = description.get("logits_difference")
    return MixtureFacts(
        experts=experts,
        top_k=count(config, "num_experts_per_tok", path),
        layers=_layers_with_experts(stored) if stored else None,
        made_by=kind if kind in CONVERSIONS else None,
        source_type=field(description, "source_type", str, said),
        init=field(description, "init", dict, said, {}),
        exact=field(description, "exact", bool, said),
        logits_difference=difference if isinstance(difference, float) and math.isfinite(difference) else None,
    )


def _layers_with_experts(stored: dict[str, StoredTensor]) -> int:
    return len({place(name)[:2] for name in stored if "experts" in name.split(".")})


def adapter_facts(config: dict, stored: dict[str, StoredTensor], path: Path) -> AdapterFacts | None:
    """What an adapter's config and header say; None where there is no adapter."""
    if not config:
        return None
    parts = {one: [tensor for name, tensor in stored.items() if name.endswith(one)] for one in ("_U", "_V", "_values")}
    tuned = max(len(parts["_U"]), len(parts["_values"]))
    whole = [name for name in stored if ".sparse_hf_dsee_" not in name]
    trained = [*parts["_U"], *parts["_V"], *parts["_values"], *(stored[name] for name in whole)]
    alpha = numbers({"alpha": {"alpha": config.get("alpha")}}, path, "alpha").get("alpha")
    return AdapterFacts(
        peft_type=field(config, "peft_type", str, path, "not recorded"),
        rank=count(config, "r", path),
        nnz=count(config, "nnz", path),
        alpha=alpha,
        tuned=tuned,
        trained=sum(math.prod(tensor.shape) for tensor in trained),
    )
