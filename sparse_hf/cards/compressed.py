"""What do the heads of a compressed checkpoint tell? No weight is expanded."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sparse_hf.cards.layers import MatrixZeros
from sparse_hf.storage.checked_json import field
from sparse_hf.storage.compressed_checkpoint import QUANT_METHOD, is_compressed, read_forms


class CompressedFacts(NamedTuple):
    """Of a compressed checkpoint.

    Attributes:
        facts: its format, and how many tensors are in which form, `bytes` and `dense_bytes`, where its files are here.
        matrices: zeros by matrix, of those that were compressed.
        parameters: of the model; None where its files are not here.
    """

    facts: dict
    matrices: tuple[MatrixZeros, ...]
    parameters: int | None


def compressed_facts(config: dict, folder: Path) -> CompressedFacts | None:
    """What is known of a compressed checkpoint; None if the config is not of one.

    Raises:
        FileNotFoundError, ValueError: shards are missing, damaged or hostile.
    """
    path = folder / "config.json"
    said = field(config, "quantization_config", dict, path, {})
    if said.get("quant_method") != QUANT_METHOD:
        return None
    facts = {"format": field(said, "format", str, path, "")[:80]}
    if not is_compressed(folder):
        return CompressedFacts(facts, (), None)
    forms = read_forms(folder)
    facts |= {"forms": dict(Counter(one.full_name for one in forms.values()))}
    facts |= {"bytes": sum(one.length for one in forms.values())}
    facts |= {"dense_bytes": sum(one.dense_bytes for one in forms.values())}
    counted = {name: one for name, one in forms.items() if one.nonzeros is not None and len(one.shape) >= 2}
    matrices = tuple(MatrixZeros(name, one.size, one.size - one.nonzeros) for name, one in counted.items() if one.size)
    return CompressedFacts(facts, matrices, sum(one.size for one in forms.values()))
