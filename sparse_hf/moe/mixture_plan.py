"""What does the FFN of one layer become: a router, experts, a shared expert?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_hf.moe.expert_init import Cut, ExpertInit, cut_of, expert_piece, factor_of, neurons_of, scaled
from sparse_hf.moe.mixture_routers import RouterConfig
from sparse_hf.moe.router_init import Router, router_tensor
from sparse_hf.moe.targets import Target
from sparse_hf.storage.pieces import FillZeros
from sparse_hf.storage.shard_plan import PlannedTensor
from sparse_hf.storage.tensor_headers import DTYPE_BITS, StoredTensor


@dataclass(frozen=True)
class Mixture:
    """What the FFNs of a model become: `experts` copies of it, cut by `init`, `top_k` experts per token.

    `router` is how routers begin, `routing` what they are, which only mixtures of ours can choose.
    """

    target: Target
    experts: int
    top_k: int
    init: ExpertInit = ExpertInit()
    router: Router = Router()
    routing: RouterConfig | None = None


def mixture_tensors(ffns: Sequence[dict[str, StoredTensor]], mixture: Mixture, layer: int) -> list[PlannedTensor]:
    """The router, the experts, and what the target wants beside them.

    Args:
        ffns: of the source, then of the branches if there are any: gate_proj, up_proj and down_proj.
    """
    target, gate = mixture.target, ffns[0]["gate_proj"]  # (neurons, hidden)
    cut = cut_of(mixture.init, target, gate.shape[0], mixture.experts, mixture.top_k)
    sizes = {"experts": cut.parts, "hidden": gate.shape[1]}
    name = target.router.format(layer=layer)
    parts = mixture.init.granularity
    planned = [router_tensor(name, layer, mixture.router, gate.dtype, gate.shape[1], mixture.experts, parts)]
    for template, shape in target.zeros.items():
        shape = tuple(sizes.get(size, size) for size in shape)
        planned.append(_zeros(template.format(layer=layer), target.zeros_dtype or gate.dtype, shape))
    if cut.shared:
        planned += _shared_expert(ffns[0], mixture, cut, layer)
    return planned + _experts(ffns[1:] or ffns, mixture, cut, layer)


def _shared_expert(ffn: dict[str, StoredTensor], mixture: Mixture, cut: Cut, layer: int) -> list[PlannedTensor]:
    """Half of the FFN, or an idle one whose down matrix is zeros."""
    shared, planned = mixture.target.shared, []
    for template, matrices in shared.tensors.items():
        stored = ffn[matrices[0]]
        shape = _matrix_shape(stored, matrices, cut.shared)
        if matrices == ("down_proj",) and not mixture.init.shared_half:
            planned.append(_zeros(template.format(layer=layer), stored.dtype, shape))
            continue
        factor = 2.0 if shared.gated and "down_proj" in matrices else 1.0  # the gate of zeros lets half through
        pieces = [neurons_of(ffn[matrix], matrix, 0, cut.shared) for matrix in matrices]
        pieces = tuple(scaled(piece, stored.dtype, factor) for piece in pieces)
        planned.append(PlannedTensor(template.format(layer=layer), stored.dtype, shape, pieces))
    return planned


def _experts(ffns: Sequence[dict[str, StoredTensor]], mixture: Mixture, cut: Cut, layer: int) -> list[PlannedTensor]:
    init, planned = mixture.init, []
    for template, matrices in mixture.target.experts.items():
        stored = ffns[0][matrices[0]]
        pieces = []
        for expert in range(cut.parts):
            copy, part = divmod(expert, init.granularity)
            key = f"{mixture.router.seed}/expert/{layer}/{expert}"
            ffn = ffns[copy % len(ffns)]
            factors = {one: factor_of(init, mixture.experts, mixture.top_k, one) for one in matrices}
            pieces.append(tuple(expert_piece(ffn, one, init, cut, part, factors[one], key) for one in matrices))
        shape = _matrix_shape(stored, matrices, cut.width)
        if "{expert}" in template:
            names = [template.format(layer=layer, expert=expert) for expert in range(cut.parts)]
            both = zip(names, pieces, strict=True)
            planned += [PlannedTensor(name, stored.dtype, shape, one) for name, one in both]
        else:
            together = tuple(piece for one in pieces for piece in one)
            planned.append(PlannedTensor(template.format(layer=layer), stored.dtype, (cut.parts, *shape), together))
    return planned


def _matrix_shape(stored: StoredTensor, matrices: tuple[str, ...], neurons: int) -> tuple[int, int]:
    """Of matrices one below the other, for so many neurons."""
    if matrices == ("down_proj",):
        return stored.shape[0], neurons
    return len(matrices) * neurons, stored.shape[1]


def _zeros(name: str, dtype: str, shape: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(name, dtype, shape, (FillZeros(math.prod(shape) * DTYPE_BITS[dtype] // 8),))
