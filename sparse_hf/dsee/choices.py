"""Where do S2's entries lie when an adapter is new, and on which base is it made?"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_hf.algorithms.sparse_low_rank import sparse_low_rank
from sparse_hf.algorithms.supports import largest_support, line_support, random_support
from sparse_hf.dsee.config import DseeConfig
from sparse_hf.dsee.layer import DseeLayer


SAMPLE = 1 << 16  # weights of a matrix that its fingerprint reads


def seeded(seed: int, name: str) -> torch.Generator:
    """The random numbers of one matrix: the same on every rank and whatever other matrices there are."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def choose_support(layer: DseeLayer, name: str, config: DseeConfig) -> Tensor:
    """Flat sorted indices, int64, shape (nnz,), into the layer's weight.

    Args:
        name: of the module; random choices depend on it and on `config.seed`.
    """
    weight = layer.frozen_weight().detach().float()
    match config.support:
        case "magnitude":
            return largest_support(weight, config.nnz)
        case "random":
            return random_support(tuple(weight.shape), config.nnz, seeded(config.seed, name))
        case "decomposition":
            return sparse_low_rank(weight, config.nnz, max(1, config.r), generator=seeded(config.seed, name)).support
    # Rows and columns are those of y = W x, whichever way the weight is stored.
    along_rows = (config.support == "rows") != layer.input_first
    return line_support(weight, config.nnz, "rows" if along_rows else "columns")


@torch.no_grad()
def fingerprint(layers: Mapping[str, DseeLayer]) -> str | None:
    """SHA-256 of up to 65,536 evenly spaced weights of each frozen matrix, rounded to bfloat16.

    Rounding makes a base loaded in bfloat16 equal to its float32 original; a sample suffices, since training changes
    nearly every weight. None where a base cannot be compared: quantized, or not loaded yet.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        if layer.quantization_backend is not None or layer.weight.device.type == "meta":
            return None
        weight = layer.frozen_weight().flatten()
        places = torch.linspace(0, weight.numel() - 1, min(SAMPLE, weight.numel()), dtype=torch.float64).round().long()
        sample = weight[places.to(weight.device)].to(device="cpu", dtype=torch.bfloat16)
        digest.update(f"{name}{list(layer.weight_shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
