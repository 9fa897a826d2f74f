"""How do tokens and experts of a mixture find each other?

Like `modeling_mixture.py`, beside which it is copied, this file needs torch and transformers only.
"""

import hashlib
import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.generic import maybe_autocast


Kind = Literal["top_k", "expert_choice", "hash", "cosine"]
TEMPERATURE = 0.3  # where a cosine router's begins, and what the least is that it can learn
LEAST_TEMPERATURE = 0.01


def _entry(default: object, name: str, text: str) -> object:
    return field(default=default, metadata={"entry": name, "help": text})


@dataclass(frozen=True)
class RouterConfig:
    """How the mixtures of `upcycle` for GPT-2, BERT, RoBERTa, ViT and T5 encoders route; their config's entries.

    Identical experts compute what one does, wherever the weights of those that take a token sum to 1: with `top_k`,
    `hash` and `cosine` for every token, with `expert_choice` for every token that some expert takes.

    Raises:
        ValueError: a value is out of range, or belongs to another kind of router.
    """

    kind: Kind = _entry(
        "top_k",
        "router",
        "'top_k': a token takes the experts with its largest logits. 'cosine': the same, logits being cosines in a "
        "space of few dimensions over a temperature (X-MoE). 'expert_choice': an expert takes the "
        "tokens of a sequence that want it most (Zhou et al. 2022); for encoders. 'hash': the token's id decides "
        "(Roller et al.).",
    )
    bias: bool = _entry(
        False,
        "router_bias",
        "Whether routers have a `selection_bias`, a buffer (experts,) of zeros at first, which is added to the logits "
        "for the choice and not for the weights, for balancing without a loss; 'top_k' and 'cosine'.",
    )
    capacity_factor: float | None = _entry(
        None,
        "capacity_factor",
        "'top_k', 'cosine': in training an expert takes ceil(factor x tokens x top_k / experts) tokens of a batch, "
        "and those that come later lose it; None: all. 'expert_choice': it takes ceil(factor x tokens / experts) of "
        "a sequence; None: top_k.",
    )
    size: int | None = _entry(
        None, "router_size", "Dimensions of a cosine router; None: half as many as experts, and at least 2."
    )
    norm_topk_prob: bool = _entry(
        True,
        "norm_topk_prob",
        "Whether the weights of a token's experts are made to sum to 1, which keeps the dense function, but leaves "
        "routers without gradient where there is one expert or all are equal. False: probabilities among all experts.",
    )

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"A router must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        for name in ("bias", "norm_topk_prob"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"A router's `{name}` must be True or False, got {getattr(self, name)!r}.")
        factor, size = self.capacity_factor, self.size
        if factor is not None and (type(factor) not in (int, float) or not 0 < factor < math.inf):
            raise ValueError(f"A router's `capacity_factor` must be above 0, got {factor!r}.")
        if size is not None and (type(size) is not int or size < 2):
            raise ValueError(f"A router's `size` must be 2 or more, got {size!r}.")
        foreign = {
            "top_k": ("size",),
            "cosine": (),
            "expert_choice": ("bias", "size"),
            "hash": ("bias", "capacity_factor", "size", "norm_topk_prob"),
        }[self.kind]
        for one in fields(self):
            if one.name in foreign and getattr(self, one.name) != one.default:
                raise ValueError(f"A router of kind {self.kind!r} has no `{one.name}`: leave it out.")

    @property
    def reads_batch(self) -> bool:
        """Whether routing needs to know padding, or token ids."""
        return self.kind in ("expert_choice", "hash") or self.capacity_factor is not None

    def entries(self) -> dict[str, object]:
        """What a config says of it: the entries that are not the default."""
        values = {one.metadata["entry"]: (getattr(self, one.name), one.default) for one in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


def router_of(config: PreTrainedConfig, causal: bool) -> RouterConfig:
    """What the config of a mixture says about its routers; where it says nothing, the default.

    Args:
        causal: whether tokens must not know of later ones.

    Raises:
        ValueError: it makes no sense, or the model cannot be routed like that.
    """
    names = {one.name: one.metadata["entry"] for one in fields(RouterConfig)}
    router = RouterConfig(**{name: getattr(config, entry) for name, entry in names.items() if hasattr(config, entry)})
    experts, top_k = config.num_experts, config.num_experts_per_tok
    if router.kind == "expert_choice" and (causal or getattr(config, "is_decoder", False)):
        raise ValueError(
            "Experts that choose among the tokens of a sequence look at later ones, so 'expert_choice' is for "
            "encoders only, got a causal model: choose another router."
        )
    if router.kind == "expert_choice" and (router.capacity_factor or 0) > experts:
        raise ValueError(
            f"With 'expert_choice' `capacity_factor` is the mean number of experts per token, at most the {experts} "
            f"experts, got {router.capacity_factor}."
        )
    if router.kind == "hash" and not getattr(config, "vocab_size", None):
        raise ValueError("A 'hash' router needs token ids, which a vision model has not: choose another router.")
    if router.kind == "hash" and top_k != 1:
        raise ValueError(f"A 'hash' router gives each token one expert, so `top_k` must be 1, got {top_k}.")
    table = getattr(config, "hash_vocab_size", 1)
    if type(table) is not int or table < 1:
        raise ValueError(f"`hash_vocab_size` must be 1 or more, got {table!r}: correct the config.")
    if router.reads_batch and getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError("Routers that must know a whole sequence need `chunk_size_feed_forward` to be 0.")
    return router


class MixtureRouter(nn.Module):
    """One logit per token and expert, computed in float32 whatever the model's dtype.

    A hook point: what `register_forward_hook` sees as output are the logits, (tokens, experts), for a balance loss or
    statistics. Tokens are those of the whole batch, flattened, padding included.
    """

    def __init__(self, experts: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=torch.float32))
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32) if bias else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (tokens, experts) of hidden states (tokens, hidden)."""
        with maybe_autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens.float(), self.weight.float())


class CosineRouter(nn.Module):
    """The same, but a logit is the cosine between the token and the expert in few dimensions, over a temperature.

    Neither grows with the norm of its vectors, which X-MoE does against the collapse of representations onto the
    experts' directions. The temperature is learned, by its logarithm.
    """

    def __init__(self, experts: int, hidden: int, size: int | None = None, bias: bool = False) -> None:
        super().__init__()
        size = size or cosine_size(experts)
        self.projection = nn.Parameter(torch.empty(size, hidden, dtype=torch.float32))
        self.weight = nn.Parameter(torch.empty(experts, size, dtype=torch.float32))
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(TEMPERATURE), dtype=torch.float32))
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32) if bias else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (tokens, experts) of hidden states (tokens, hidden)."""
        with maybe_autocast(tokens.device.type, enabled=False):
            low = nn.functional.linear(tokens.float(), self.projection.float())
            directions = nn.functional.normalize(self.weight.float(), dim=-1)
            cosines = nn.functional.linear(nn.functional.normalize(low, dim=-1), directions)
            return cosines / self.log_temperature.float().exp().clamp(min=LEAST_TEMPERATURE)


def cosine_size(experts: int) -> int:
    """Dimensions of a cosine router by default: half as many as experts, as in X-MoE, and at least 2."""
    return max(2, experts // 2)


class HashRouter(nn.Module):
    """The expert of each token id, from a table that is not trained; ids added later begin at its top again."""

    def __init__(self, experts: int, vocabulary: int, layer: int) -> None:
        super().__init__()
        table = torch.empty(vocabulary, dtype=torch.int16)
        self.register_buffer("table", table if table.is_meta else table.copy_(hash_table(vocabulary, experts, layer)))

    def forward(self, ids: Tensor) -> Tensor:
        """Experts, int64, of token ids, of the same shape."""
        return self.table[ids.remainder(len(self.table))].long()


def hash_table(vocabulary: int, experts: int, layer: int, seed: int = 0) -> Tensor:
    """An expert per token id, int16 (vocabulary,): each has as many ids as any other, or one more.

    Drawn by seed and layer. Ids are balanced, not tokens of a text: a frequent one makes its expert a busy one.
    """
    key = hashlib.sha256(f"{seed}/hash/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    order = torch.randperm(vocabulary, generator=generator, device="cpu")
    return (order % experts).to(torch.int16)


def experts_by_logits(logits: Tensor, bias: Tensor | None, top_k: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The experts (tokens, top_k) with the largest logits, `bias` (experts,) added to these, and their weights."""
    if bias is None:
        chosen, experts = logits.topk(top_k, dim=-1)
    else:
        experts = (logits.detach() + bias.float()).topk(top_k, dim=-1).indices
        chosen = logits.gather(-1, experts)
    return experts, chosen.softmax(dim=-1) if normalised else logits.softmax(dim=-1).gather(-1, experts)


def within_capacity(experts: Tensor, count: int, factor: float, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Which choices are kept where each of `count` experts takes ceil(factor x tokens x top_k / count) tokens.

    Tokens come in order, each with all its choices, so no choice depends on later tokens (as it would if all first
    choices came before any second one). Exact for the decimal number that `factor` is written as.

    Args:
        experts: (tokens, top_k).
        counted: bool (tokens,), False for padding, which is not kept and takes no place.

    Returns:
        Bool (tokens, top_k), and the fraction of counted choices that are lost, a float32 number on the device.
    """
    flat = torch.where(counted[:, None], experts, count).reshape(-1)
    order = flat.argsort(stable=True)
    sizes = flat.new_zeros(count + 1).scatter_add_(0, flat, torch.ones_like(flat))
    before = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(len(flat), device=flat.device) - before[flat[order]]
    choices = counted.sum() * experts.shape[1]
    kept = (ranks < _share(choices, factor, count)) & (flat < count)
    return kept.reshape(experts.shape), 1 - kept.sum() / choices.clamp(min=1)


def tokens_by_experts(scores: Tensor, factor: float, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of each sequence the experts take: those with the largest scores, ties by position.

    Args:
        scores: (sequences, length, experts).
        counted: bool (sequences, length), False for padding, which is not taken.

    Returns:
        Positions (sequences, experts, places), the best first, and bool of the same shape: an expert takes
        ceil(factor x tokens / experts) of a sequence and at most all; places beyond are for longer sequences.
    """
    _, length, experts = scores.shape
    places = min(length, _share(length, factor, experts))
    # Probabilities are at least 0.
    ranked = scores.detach().masked_fill(~counted[..., None], -1.0).transpose(1, 2)
    positions = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :places]
    tokens = counted.sum(dim=1)
    taken = torch.minimum(_share(tokens, factor, experts), tokens)
    return positions, torch.arange(places, device=scores.device) < taken[:, None, None].expand(-1, experts, 1)


def _share(tokens: Tensor | int, factor: float, experts: int) -> Tensor | int:
    """ceil(factor x tokens / experts) in whole numbers, `factor` being the decimal number that is written."""
    exact = Fraction(repr(factor)) / experts
    return (tokens * exact.numerator + exact.denominator - 1) // exact.denominator
