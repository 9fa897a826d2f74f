"""Which zeros, heads and neurons do the files of a folder tell of?"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparse_hf.cards.descriptions import described_units, slim_units
from sparse_hf.cards.inspection import UnitsKept
from sparse_hf.cards.layers import MatrixZeros
from sparse_hf.cards.zero_counts import count_ones, count_zeros, has_countable_zeros
from sparse_hf.storage.file_names import CONFIG_FILE, DESCRIPTION_FILE, UNITS_FILE
from sparse_hf.storage.mask_file import MASKS_FILE, load_bits
from sparse_hf.storage.tensor_headers import StoredTensor


DSEE_MASK = ".sparse_hf_dsee_mask"


def masked_zeros(folder: Path, stored_adapter: Mapping[str, StoredTensor]) -> tuple[MatrixZeros, ...] | None:
    """Zeros by the mask file, or by the masks that a DSEE adapter holds; None without any."""
    if (folder / MASKS_FILE).is_file():
        bits, shapes = load_bits(folder / MASKS_FILE)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        return tuple(MatrixZeros(name, size, size - count_ones(bits[name].numpy())) for name, size in sizes.items())
    masks = {name: tensor for name, tensor in stored_adapter.items() if name.endswith(DSEE_MASK)}
    if not masks:
        return None
    return tuple(_dsee_zeros(name, tensor, stored_adapter) for name, tensor in masks.items())


def _dsee_zeros(name: str, mask: StoredTensor, stored: Mapping[str, StoredTensor]) -> MatrixZeros:
    """Of one frozen matrix. Its shape is that of U V; where it is only masked, it has eight weights to a byte."""
    path = name.removesuffix("_mask")
    low_rank = [stored[path + part] for part in ("_U", "_V") if path + part in stored]
    weights = low_rank[0].shape[0] * low_rank[1].shape[-1] if len(low_rank) == 2 else 8 * mask.length
    if mask.dtype != "U8" or not weights <= 8 * mask.length < weights + 8:
        raise ValueError(
            f"`{name}` in `{mask.file}` must hold a bit for each of {weights} weights, got {mask.length} bytes of "
            f"{mask.dtype}. The file is damaged or hostile."
        )
    packed = np.fromfile(mask.file, dtype=np.uint8, count=mask.length, offset=mask.offset)
    module = path.removesuffix(".sparse_hf_dsee").removeprefix("base_model.model.")
    return MatrixZeros(module, weights, weights - count_ones(packed))


def kept_units(folder: Path, description: dict, config: dict) -> tuple[UnitsKept, ...]:
    """Heads and neurons by the file of a structured ticket, or else by what the descriptions of a slim model say."""
    if (folder / UNITS_FILE).is_file():
        bits, shapes = load_bits(folder / UNITS_FILE)
        keys = {key: key.rpartition(".") for key in shapes}
        return tuple(
            UnitsKept(layer, kind, count_ones(bits[key].numpy()), math.prod(shapes[key]))
            for key, (layer, _, kind) in keys.items()
        )
    return described_units(description, folder / DESCRIPTION_FILE) or slim_units(config, folder / CONFIG_FILE)


def counted_zeros(weights: Mapping[str, StoredTensor]) -> tuple[MatrixZeros, ...]:
    """Exact zeros of all stored matrices; every byte of them is read."""
    matrices = [tensor for tensor in weights.values() if has_countable_zeros(tensor)]
    return tuple(MatrixZeros(one.name, math.prod(one.shape), count_zeros(one)) for one in matrices)
