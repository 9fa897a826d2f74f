"""Which heads and neurons would be cut now?"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.unit_selection import keep_counts, select_units, tied_at_cut
from sparse_hf.anatomy.canonical_names import unwrap
from sparse_hf.anatomy.modeling_slim import UnitTable, base_of
from sparse_hf.anatomy.units import find_units, table_of
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig
from sparse_hf.tickets.latency_table import LatencyTable, choose_unit_counts


def draw_units(
    scores: Mapping[str, Tensor], config: EarlyBirdConfig, latency: LatencyTable | None = None
) -> dict[str, Tensor]:
    """The masks of the units that stay, by key.

    Under a `target_speedup` a unit is worth its score over the least one of its kind; see `choose_unit_counts`.

    Args:
        scores: 1-D, higher = more important, by unit key.
        latency: of the model, for a `target_speedup`.

    Raises:
        ValueError: the budget would empty a layer, or the speed-up cannot be reached.
    """
    if config.target_speedup is not None:
        worth = _above_least(scores)
        counts = choose_unit_counts(worth, latency, config.target_speedup, config.neuron_multiple)
        masks = keep_counts(list(scores.values()), [counts[key] for key in scores])
        return dict(zip(scores, masks, strict=True))
    masks = {}
    for kind, fraction, scope, multiple in _budgets(config):
        keys = [key for key in scores if key.endswith(f".{kind}")]
        chosen = select_units([scores[key] for key in keys], fraction, scope, multiple)
        masks.update(zip(keys, chosen, strict=True))
    return {key: masks[key] for key in scores}


def _above_least(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores over the least one of their kind: coefficients end near 1, and what tells units apart is the rest."""
    kinds = {key: key.rpartition(".")[2] for key in scores}
    least = {kind: min(float(scores[key].min()) for key in scores if kinds[key] == kind) for kind in kinds.values()}
    return {key: score - least[kinds[key]] for key, score in scores.items()}


def is_tied(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], config: EarlyBirdConfig) -> bool:
    """Whether a crowd of equal scores lies at a cut, so that the masks were drawn by index; see `tied_at_cut`."""
    for kind, _, scope, _ in _budgets(config):
        keys = [key for key in scores if key.endswith(f".{kind}")]
        if tied_at_cut([scores[key] for key in keys], [masks[key] for key in keys], scope):
            return True
    return False


def _budgets(config: EarlyBirdConfig) -> tuple[tuple[str, float, str, int], ...]:
    return (
        ("heads", config.heads, config.head_scope, 1),
        ("neurons", config.neurons, config.neuron_scope, config.neuron_multiple),
    )


@torch.no_grad()
def magnitude_scores(model: nn.Module, table: UnitTable | None = None) -> dict[str, Tensor]:
    """The L2 norm of all weights that belong to a head or a neuron, on the CPU, by unit key.

    A head's weights are its rows of the query, key and value projections and its columns of the output projection, a
    neuron's its row of up (and gate) and its column of down; biases are left out.
    """
    model = unwrap(model)
    table, base = table or table_of(model), base_of(model)[1]
    scores = {}
    for one in find_units(model, table):
        layer = base.get_submodule(one.key.rpartition(".")[0])
        heads = one.kind == "heads"
        squares = _squares(
            layer.get_submodule(table.head_output if heads else table.neuron_output), "in", one.count, 1
        )
        for path, parts in (table.head_projections if heads else table.neuron_projections).items():
            squares = squares + _squares(layer.get_submodule(path), "out", one.count, parts)
        scores[one.key] = squares.sqrt()
    return scores


def _squares(module: nn.Module, side: str, count: int, parts: int) -> Tensor:
    """Per unit, the sum of squares of its rows (side "out") or columns ("in")."""
    stored_out_first = isinstance(module, nn.Linear)
    by_unit = module.weight if stored_out_first == (side == "out") else module.weight.T
    return by_unit.float().reshape(parts, count, -1).square().sum(dim=(0, 2)).cpu()
