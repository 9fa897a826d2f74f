"""Have the representations or the experts of a mixture collapsed? Measured on a dataset, on request."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.representation_collapse import (
    Spread,
    effective_rank,
    mean_off_diagonal,
    output_similarity,
    weight_similarity,
)
from sparse_hf.moe.counted_tokens import counted_tokens
from sparse_hf.moe.expert_calls import ExpertCall, expert_calls, experts_by_block


@dataclass(frozen=True)
class CollapseMeasures:
    """Of every layer with experts.

    Attributes:
        layers: names of the blocks, in model order.
        tokens: that were read, without padding.
        effective_rank: of the hidden states that the experts get, float64 (layers,), from 1 to hidden. See
            `algorithms.representation_collapse.effective_rank`.
        weight_similarity: cosine of any two experts' weights, float64 (layers, experts, experts).
        output_similarity: mean cosine of what any two experts make of the same tokens, of that shape.
    """

    layers: tuple[str, ...]
    tokens: int
    effective_rank: Tensor
    weight_similarity: Tensor
    output_similarity: Tensor

    def log_entries(self) -> dict[str, float]:
        """For `trainer.log`: each the mean over layers (and pairs of experts) and the most collapsed layer."""
        entries = {"effective_rank": float(self.effective_rank.mean())}
        entries["effective_rank_worst_layer"] = float(self.effective_rank.min())
        pairs = {
            "expert_weight_similarity": self.weight_similarity,
            "expert_output_similarity": self.output_similarity,
        }
        for name, similarity in pairs.items():
            layers = mean_off_diagonal(similarity)
            entries |= {name: float(layers.mean()), f"{name}_worst_layer": float(layers.max())}
        return entries


@torch.no_grad()
def measure_collapse(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], compared_tokens: int = 64, seed: int = 0
) -> CollapseMeasures:
    """Measure hidden states and experts of a mixture over a dataset; nothing of the model is changed.

    Memory does not grow with the dataset: per layer hidden x hidden float64 and the hidden states of the compared
    tokens; one layer after the other, the outputs of all experts for these.

    Args:
        model: in eval mode, of a family whose routers can be read, see `docs/moe_balance.md`.
        batches: keyword arguments of the model, such as a `DataLoader` gives. Tokens where `attention_mask` (batch,
            length) is 0 are left out.
        compared_tokens: drawn evenly from all tokens, on which every expert is run to compare outputs.
        seed: of that draw.

    Raises:
        ValueError: another family, training mode, no tokens, a mask of another shape, or experts that cannot be read.
    """
    if type(compared_tokens) is not int or compared_tokens < 1:
        raise ValueError(f"`compared_tokens` must be 1 or more, got {compared_tokens!r}.")
    experts = experts_by_block(model)
    spreads = {name: Spread() for name in experts}
    sample = TokenSample(compared_tokens, seed)
    for batch in batches:
        calls = expert_calls(model, experts, batch)
        counted = counted_tokens(batch.get("attention_mask"), len(next(iter(calls.values())).hidden))
        for name, call in calls.items():
            spreads[name].add(call.hidden[counted.to(call.hidden.device)])
        sample.add(calls, counted)
    tokens = next(iter(spreads.values())).rows
    if not tokens:
        raise ValueError("Collapse is measured on at least one token that is not padding, got none.")
    outputs = [output_similarity(_outputs(module, sample.hidden[name])).cpu() for name, module in experts.items()]
    return CollapseMeasures(
        layers=tuple(experts),
        tokens=tokens,
        effective_rank=torch.tensor(
            [effective_rank(one.covariance()) for one in spreads.values()], dtype=torch.float64
        ),
        weight_similarity=torch.stack([weight_similarity(_stacks(*one)).cpu() for one in experts.items()]),
        output_similarity=torch.stack(outputs),
    )


class TokenSample:
    """A fixed number of tokens, each token of the dataset with the same chance, the same ones in every layer.

    Attributes:
        hidden: their hidden states (tokens, hidden), by layer.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.hidden: dict[str, Tensor] = {}
        self._size, self._keys = size, torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, calls: Mapping[str, ExpertCall], counted: Tensor) -> None:
        """Let the counted tokens of a batch take part: those with the largest random keys stay."""
        keys = torch.cat([self._keys, torch.rand(int(counted.sum()), generator=self._generator)])
        stay = keys.argsort(descending=True, stable=True)[: self._size]
        self._keys = keys[stay]
        for name, call in calls.items():
            device = call.hidden.device
            new = call.hidden[counted.to(device)]
            together = torch.cat([self.hidden[name], new]) if name in self.hidden else new
            self.hidden[name] = together[stay.to(device)]


def _outputs(experts: nn.Module, hidden: Tensor) -> Tensor:
    """What each expert alone makes of the tokens, (experts, tokens, hidden)."""
    weights = hidden.new_ones(len(hidden), 1)
    indices = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
    return torch.stack([experts(hidden, indices + one, weights) for one in range(experts.num_experts)])


def _stacks(name: str, experts: nn.Module) -> list[Tensor]:
    stacks = list(experts.parameters())
    if not stacks or any(len(one) != experts.num_experts for one in stacks):
        raise ValueError(
            f"The experts of `{name}` must be stacks of {experts.num_experts} matrices, but hold others: they are "
            "wrapped or quantised. Merge adapters first."
        )
    return stacks
