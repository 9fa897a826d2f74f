"""What will an upcycling write, what does it cost, and is it exact? Decided from headers alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from sparse_hf.moe.chosen_layers import chosen_layers
from sparse_hf.moe.conversions import generic_conversion, native_conversion, untied
from sparse_hf.moe.expert_init import ExpertInit, changes_function
from sparse_hf.moe.generic_families import STORED_FEED_FORWARDS
from sparse_hf.moe.generic_plan import CODE, generic_pair
from sparse_hf.moe.generic_routers import changes_function as routing_changes
from sparse_hf.moe.mixture_plan import Mixture
from sparse_hf.moe.mixture_routers import RouterConfig
from sparse_hf.moe.pairs import Pair, pair_of
from sparse_hf.moe.router_init import Router
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.shard_plan import PlannedShard, plan_digest, plan_shards
from sparse_hf.storage.shard_writer import free_bytes


WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
# What belongs to a model beside weights and config; nothing of it is code.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class UpcyclingPlan:
    """What an upcycling will do; printing it says so in words."""

    source: Path
    destination: Path
    pair: Pair
    config: PreTrainedConfig
    shards: tuple[PlannedShard, ...]
    digest: str
    mixture: Mixture
    branches: tuple[Path, ...]
    layers: int
    all_layers: int
    dense_bytes: int
    ffn_ratio: float
    code: tuple[Path, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.file_bytes() for shard in self.shards)

    @property
    def changed(self) -> str | None:
        """Why the mixture does not compute what the dense model does; None where it does."""
        if self.branches:
            return f"experts come from {len(self.branches)} models"
        mixture = self.mixture
        routed = routing_changes(mixture.routing or RouterConfig(), mixture.experts, mixture.top_k)
        return changes_function(mixture.init, mixture.experts) or routed

    def __str__(self) -> str:
        target, free = self.pair.target, free_bytes(self.destination)
        return (
            f"{self.pair.source} -> {target.model_type} ({target.architecture}): {self.layers} of {self.all_layers} "
            f"layers, {getattr(self.config, target.count)} experts, top {getattr(self.config, target.top_k)}"
            f"{self._router_kind()}\n"
            f"{self._function()}{target.remark}{self._shared_expert()}"
            f"{self.dense_bytes / 1e9:.2f} GB -> {self.bytes / 1e9:.2f} GB in {len(self.shards)} files, "
            f"{free / 1e9:.1f} GB free; FFN FLOPs per token {self.ffn_ratio:.2f} x dense"
        )

    def _router_kind(self) -> str:
        routing = self.mixture.routing
        return "" if routing is None else f", router {routing.kind}"

    def _function(self) -> str:
        target, routing = self.pair.target, self.mixture.routing
        if self.changed:
            return f"Not exact: {self.changed}. The difference of the logits is measured and told, not limited.\n"
        if routing is not None and routing.kind == "hash":
            return "Exact: the experts are copies. Which one a token takes is decided by its id and is not trained.\n"
        balance = "`SparseTrainer(balance=BalanceConfig())`"
        if target.balance_loss:
            balance += "; `output_router_logits=True` in the config turns the model's own on, which pools layers"
        return (
            "Exact: the experts are copies, or parts that are chosen together, and the weights of those chosen sum to "
            "1 for every token, so the logits stay. For the same reason the language-model loss gives routers no "
            "gradient until experts differ: train "
            f"with a load-balancing loss ({balance}).\n"
        )

    def _shared_expert(self) -> str:
        shared = self.pair.target.shared
        if shared is None or (shared.optional and not self.mixture.init.shared_half):
            return ""
        if self.mixture.init.shared_half:
            return "One half of each FFN is the shared expert for every token, the experts are copies of the other.\n"
        if shared.width is not None:
            part = f"1/{shared.parts} of the dense FFN's width"
        else:
            part = "as wide as the dense FFN" if self.mixture.init.granularity == 1 else "as wide as an expert"
        return (
            f"{self.pair.target.model_type} has a shared expert for every token: {part}, gate and up copied, down "
            "zero, so that it adds exactly 0 until training changes that.\n"
        )


def plan_upcycling(
    source: str | Path,
    destination: str | Path,
    experts: int = 8,
    top_k: int = 2,
    layers: Sequence[int] | str | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    target: str | None = None,
    init: ExpertInit | None = None,
    branches: Sequence[str | Path] = (),
    average: bool = False,
    router_rows: Mapping[int, np.ndarray] | None = None,
    router: RouterConfig | None = None,
    untie: bool = False,
) -> UpcyclingPlan:
    """What `upcycle` would do with the same arguments; reads headers only and writes nothing.

    Raises:
        FileNotFoundError: no such checkpoint, or a shard is missing.
        ValueError: the source has no exact target, is damaged, or the numbers do not fit.
    """
    _check_numbers(experts, top_k, router_std, max_shard_bytes, len(branches), average)
    folder = local_folder(source, ["config.json", *WEIGHTS, *COMPANIONS])
    config = AutoConfig.from_pretrained(folder)
    generic = config.model_type in STORED_FEED_FORWARDS
    pair = generic_pair(config, target) if generic else pair_of(config, target)
    if untie and generic:
        raise ValueError(f"`untie` is for stock mixtures, which engines read: leave it out for {config.model_type}.")
    chosen = chosen_layers(pair.target, config.num_hidden_layers, layers)
    start = Router(router_std, seed, router_rows)
    mixture = Mixture(pair.target, experts, top_k, init or ExpertInit(), start, router)
    others = tuple(local_folder(one, ["config.json", *WEIGHTS]) for one in branches)
    convert = generic_conversion if generic else native_conversion
    made = convert((folder, *others), config, pair, mixture, chosen, average)
    if untie:
        made = untied(made)
    shards = tuple(plan_shards(made.tensors, max_shard_bytes))
    options = {name: value for name, value in made.config.to_dict().items() if name != "transformers_version"}
    sources = [told_apart(stored.file for stored in one.values()) for one in made.sources]
    count = config.num_hidden_layers
    return UpcyclingPlan(
        source=folder,
        destination=Path(destination),
        pair=pair,
        config=made.config,
        shards=shards,
        digest=plan_digest(shards, {"config": options, "sources": sources}),
        mixture=mixture,
        branches=others,
        layers=len(chosen),
        all_layers=count,
        dense_bytes=sum(stored.length for stored in made.sources[0].values()),
        ffn_ratio=(len(chosen) * made.ffns_per_token + count - len(chosen)) / count,
        code=CODE if generic else (),
    )


def told_apart(files: Iterable[Path]) -> list[tuple[str, str | int]]:
    """What tells source files from others of equal name, size and header, as two fine-tunings of one model have."""
    # In the Hub's cache a file is a link to its content's hash.
    return [
        (file.name, file.resolve().name if file.is_symlink() else file.stat().st_mtime_ns)
        for file in sorted(set(files))
    ]


def _check_numbers(
    experts: int, top_k: int, router_std: float, max_shard_bytes: int, branches: int, average: bool
) -> None:
    if type(experts) is not int or experts < 1:
        raise ValueError(f"`experts` must be 1 or more, got {experts!r}.")
    if type(top_k) is not int:
        raise ValueError(f"`top_k` must be a whole number, got {top_k!r}.")
    if branches and experts % branches:
        raise ValueError(f"`experts` must be a multiple of the {branches} branches, got {experts}.")
    if average and not branches:
        raise ValueError("`average` needs `branches` to average.")
    if not 0 <= router_std < float("inf"):
        raise ValueError(f"`router_std` must be 0 or more, got {router_std!r}.")
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be 1 or more, got {max_shard_bytes!r}.")
