"""The losses of a `BalanceConfig` for one micro-batch, given what is known of its whole optimizer step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_hf.algorithms.balance import (
    Scores,
    chosen_counts,
    chosen_counts_by_sequence,
    chosen_fractions,
    device_sums,
    entropy_sums,
    sequence_loss_sums,
    switch_loss,
    token_probabilities,
    z_loss_sums,
)
from sparse_hf.moe.balance_config import BalanceConfig
from sparse_hf.moe.router_logits import Routing


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass, all layers.

    Attributes:
        inputs: of the routers, one (tokens, hidden) per layer, detached.
        logits: (layers, tokens, experts), float32 whatever the model computes in.
        counted: bool (tokens,), False for padding.
        counts: of choices on this rank, int64 (layers, experts).
        top_k: experts per token.
        sequence: of which sequence each token is, int64 (tokens,); None where nobody asks.
        sequence_counts: of choices in each sequence, int64 (layers, sequences, experts), or None.
    """

    inputs: list[Tensor]
    logits: Tensor
    counted: Tensor
    counts: Tensor
    top_k: int
    sequence: Tensor | None = None
    sequence_counts: Tensor | None = None

    def totals(self) -> Tensor:
        """What the whole step needs to know of this micro-batch, to be added up: int64 (layers * experts + 1,).

        Counts of choices, and the number of sequences that have tokens.
        """
        sequences = self.counts.new_zeros(1)
        if self.sequence_counts is not None:
            sequences = (self.sequence_counts[0].sum(dim=-1) > 0).sum()[None]
        return torch.cat([self.counts.flatten(), sequences])


def micro_batch(
    routings: list[Routing],
    counted: Tensor,
    experts: int,
    sequences: tuple[Tensor, int] | None,
    with_graph: bool,
) -> MicroBatch:
    """What was read of one forward pass, layers stacked.

    Args:
        sequences: of which sequence each token is, and their number, see `sequence_numbers`.
        with_graph: logits keep the graph of the pass.
    """
    logits = torch.stack([(one.logits if with_graph else one.logits.detach()).float() for one in routings])
    chosen = torch.stack([one.chosen for one in routings])
    inputs, top_k = [one.inputs for one in routings], chosen.shape[-1]
    if sequences is None:
        return MicroBatch(inputs, logits, counted, chosen_counts(chosen, counted, experts), top_k)
    by_sequence = chosen_counts_by_sequence(chosen, counted, experts, *sequences)
    return MicroBatch(inputs, logits, counted, by_sequence.sum(1), top_k, sequences[0], by_sequence)


@dataclass(frozen=True)
class Totals:
    """What is known of a whole optimizer step: all its micro-batches on all ranks.

    Attributes:
        counts: of choices, int64 (layers, experts).
        tokens: counted ones, at least 1; a scalar.
        sequences: with tokens, at least 1; a scalar.
    """

    counts: Tensor
    tokens: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, added_up: Tensor, layers: int, top_k: int) -> "Totals":
        """From the sum of all `MicroBatch.totals`."""
        counts = added_up[:-1].view(layers, -1)
        return cls(counts, counts[0].sum().clamp(min=1) / top_k, added_up[-1].clamp(min=1))


def losses_by_layer(config: BalanceConfig, scores: Scores, batch: MicroBatch, totals: Totals) -> dict[str, Tensor]:
    """This micro-batch's part of each loss that is on, by name, float32 (layers,) and without coefficients.

    Parts of all micro-batches on all ranks add up to the loss of the step, which so does not depend on the split.
    """
    probabilities = torch.where(batch.counted[:, None], token_probabilities(batch.logits, scores), 0.0)
    sums = probabilities.sum(dim=-2)
    fractions = chosen_fractions(totals.counts)
    losses = {"balance_loss": switch_loss(fractions, sums) / totals.tokens}
    if config.z:
        losses["router_z_loss"] = z_loss_sums(batch.logits, batch.counted) / totals.tokens
    if config.sequence:
        within = sequence_loss_sums(probabilities, batch.sequence_counts, batch.sequence, batch.top_k)
        losses["sequence_balance_loss"] = within / totals.sequences
    if config.device:
        fractions, sums = (device_sums(one, config.device_groups) for one in (fractions, sums))
        losses["device_balance_loss"] = switch_loss(fractions, sums) / totals.tokens
    if config.entropy:
        losses["routing_entropy"] = entropy_sums(batch.logits, batch.counted, scores) / totals.tokens
    return losses


def weighted(config: BalanceConfig, losses: dict[str, Tensor]) -> Tensor:
    """The losses of all layers, times their coefficients; a scalar."""
    coefficients = {
        "balance_loss": config.coefficient,
        "router_z_loss": config.z,
        "sequence_balance_loss": config.sequence,
        "device_balance_loss": config.device,
        "routing_entropy": config.entropy,
    }
    parts = [coefficients[name] * loss for name, loss in losses.items() if coefficients[name]]
    return torch.stack(parts).sum()
