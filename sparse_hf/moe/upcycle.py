"""Turn a dense checkpoint into a mixture of experts that stock Transformers and engines load."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparse_hf import __version__
from sparse_hf.moe.logits_check import TOLERANCE, largest_difference
from sparse_hf.moe.pairs import Pair, pair_of, target_values
from sparse_hf.moe.upcycling_plan import Router, plan_tensors, split_rows
from sparse_hf.storage.durable import write_json
from sparse_hf.storage.locations import local_folder
from sparse_hf.storage.shard_plan import PlannedShard, plan_digest, plan_shards
from sparse_hf.storage.shard_writer import free_bytes, missing_shards, require_space, write_index, write_shards
from sparse_hf.storage.tensor_headers import StoredTensor, read_headers


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
    layers: int
    all_layers: int
    dense_bytes: int
    ffn_ratio: float

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.file_bytes() for shard in self.shards)

    def __str__(self) -> str:
        target = self.pair.target
        free = free_bytes(self.destination)
        balance = (
            "`output_router_logits=True` in the config turns the model's own on"
            if target.balance_loss
            else f"Transformers has none for {target.model_type}: bring your own"
        )
        return (
            f"{self.pair.source} -> {target.model_type} ({target.architecture}): {self.layers} of {self.all_layers} "
            f"layers, {getattr(self.config, target.count)} experts, top {getattr(self.config, target.top_k)}\n"
            "Exact: the experts are copies, and the weights of those chosen sum to 1 for every token, so the logits "
            "stay. For the same reason the language-model loss gives routers no gradient until experts differ: train "
            f"with a load-balancing loss ({balance}).\n"
            f"{target.remark}{self._shared_expert()}"
            f"{self.dense_bytes / 1e9:.2f} GB -> {self.bytes / 1e9:.2f} GB in {len(self.shards)} files, "
            f"{free / 1e9:.1f} GB free; FFN FLOPs per token {self.ffn_ratio:.2f} x dense"
        )

    def _shared_expert(self) -> str:
        shared = self.pair.target.shared
        if shared is None:
            return ""
        part = "as wide as the dense FFN" if shared.parts == 1 else f"1/{shared.parts} of the dense FFN's width"
        return (
            f"{self.pair.target.model_type} has a shared expert for every token: {part}, gate and up copied, down "
            "zero, so that it adds exactly 0 until training changes that.\n"
        )


def plan_upcycling(
    source: str | Path,
    destination: str | Path,
    experts: int = 8,
    top_k: int = 2,
    layers: Sequence[int] | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    target: str | None = None,
) -> UpcyclingPlan:
    """What `upcycle` would do with the same arguments; reads headers only and writes nothing.

    Raises:
        FileNotFoundError: no such checkpoint, or a shard is missing.
        ValueError: the source has no exact target, is damaged, or the numbers do not fit.
    """
    _check_numbers(experts, top_k, router_std, max_shard_bytes)
    folder = local_folder(source, ["config.json", *WEIGHTS, *COMPANIONS])
    config = AutoConfig.from_pretrained(folder)
    pair = pair_of(config, target)
    chosen = _chosen_layers(pair, config.num_hidden_layers, layers)
    headers = split_rows(read_headers(folder), pair, config)
    tensors = plan_tensors(headers, pair.target, chosen, experts, Router(router_std, seed))
    shards = tuple(plan_shards(tensors, max_shard_bytes))
    dense = tuple(sorted(set(range(config.num_hidden_layers)) - chosen))
    neurons = headers[f"model.layers.{min(chosen)}.mlp.gate_proj.weight"].shape[0]
    values = target_values(pair, config, neurons, experts, top_k, dense)
    mixture = CONFIG_MAPPING[pair.target.model_type](**values, dtype=config.dtype)
    options = {name: value for name, value in mixture.to_dict().items() if name != "transformers_version"}
    shared = 1 / pair.target.shared.parts if pair.target.shared else 0
    return UpcyclingPlan(
        source=folder,
        destination=Path(destination),
        pair=pair,
        config=mixture,
        shards=shards,
        digest=plan_digest(shards, {"config": options, "sources": _identities(headers)}),
        layers=len(chosen),
        all_layers=config.num_hidden_layers,
        dense_bytes=sum(stored.length for stored in headers.values()),
        ffn_ratio=(len(chosen) * (top_k + shared) + len(dense)) / config.num_hidden_layers,
    )


def upcycle(
    source: str | Path,
    destination: str | Path,
    experts: int = 8,
    top_k: int = 2,
    layers: Sequence[int] | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    check_tokens: int = 256,
    progress: bool = True,
    target: str | None = None,
) -> UpcyclingPlan:
    """Write a mixture of experts whose experts are exact copies of the dense FFN (Komatsuzaki et al. 2022).

    The target is a stock architecture with the names that its own checkpoints have on the Hub, so that Transformers,
    vLLM and SGLang read it with no code of ours (no engine was run by us). Weights are copied block by block; no model
    is held in memory but for the check at the end. Called again after a kill it goes on, and the files are those of an
    uninterrupted run, byte for byte. Several processes may be called alike and share the shards; the last to finish
    completes the folder. It can be loaded only once everything is written and checked.

    Args:
        source: folder or Hub id of a dense checkpoint in safetensors.
        destination: a new folder.
        experts: of every mixture.
        top_k: experts per token; 1 leaves routers without any gradient from the language-model loss, for ever.
        layers: which layers become mixtures; all by default. Only Qwen2-MoE and Qwen3-MoE can leave layers
            dense.
        router_std: standard deviation of the routers' normal start; 0 for zeros.
        seed: of the routers and of the check's tokens.
        max_shard_bytes: of one file.
        check_tokens: how many random tokens the logits of both models are compared on; 0 skips the comparison, which
            needs the memory of the mixture in fp32.
        progress: show a bar.
        target: `model_type` of the mixture, where a family has several that are exact (Llama, Mistral and Qwen2 also
            become "glm4_moe", Qwen3 that and "dots1"); by default the one that most engines have had for longest.

    Raises:
        FileNotFoundError, ValueError: see `plan_upcycling`; or the logits differ, and the folder stays without config.
        FileExistsError: the destination holds something else.
        OSError: the disk is full, or too small (refused before the first byte).
    """
    plan = plan_upcycling(source, destination, experts, top_k, layers, router_std, seed, max_shard_bytes, target)
    carry_out(plan, check_tokens, progress, seed)
    return plan


def carry_out(plan: UpcyclingPlan, check_tokens: int = 256, progress: bool = True, seed: int = 0) -> None:
    """Write what a plan says; see `upcycle`."""
    _check_destination(plan)
    missing = set(missing_shards(plan.destination, plan.shards))
    require_space(plan.destination, sum(shard.file_bytes() for shard in plan.shards if shard.name in missing))
    with tqdm(total=plan.bytes, unit="B", unit_scale=True, desc="upcycling", disable=not progress) as bar:
        elsewhere = write_shards(plan.destination, plan.shards, plan.digest, bar.update)
    if elsewhere:
        return
    write_index(plan.destination, plan.shards)
    difference = None
    if check_tokens:
        difference = largest_difference(plan.source, plan.destination, plan.config, check_tokens, seed)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The logits of the mixture must be those of the dense model to {TOLERANCE:g} of the largest, got "
                f"{difference:.2g}. `{plan.destination}` is left without a config, so that nothing loads it."
            )
    _finish(plan, difference)


def _finish(plan: UpcyclingPlan, difference: float | None) -> None:
    """What makes the folder a model, the config last."""
    for name in COMPANIONS:
        if (plan.source / name).is_file():
            shutil.copyfile(plan.source / name, plan.destination / name)
    description = {
        "kind": "upcycled_model",
        "source_type": plan.pair.source,
        "target_type": plan.pair.target.model_type,
        "experts": getattr(plan.config, plan.pair.target.count),
        "top_k": getattr(plan.config, plan.pair.target.top_k),
        "digest": plan.digest,
        "logits_difference": difference,
        "versions": {"sparse_hf": __version__},
    }
    write_json(plan.destination / "sparse_hf.json", description)
    write_json(plan.destination / "config.json", plan.config.to_dict())


def _identities(headers: Mapping[str, StoredTensor]) -> dict[str, str | int]:
    """What tells a source file from one of equal name, size and header: two fine-tunings of one model have those."""
    files = {stored.file for stored in headers.values()}
    # In the Hub's cache a file is a link to its content's hash.
    return {file.name: file.resolve().name if file.is_symlink() else file.stat().st_mtime_ns for file in files}


def _check_numbers(experts: int, top_k: int, router_std: float, max_shard_bytes: int) -> None:
    if type(experts) is not int or experts < 2:
        raise ValueError(f"`experts` must be 2 or more, got {experts!r}.")
    if type(top_k) is not int or not 1 <= top_k <= experts:
        raise ValueError(f"`top_k` must be between 1 and the {experts} experts, got {top_k!r}.")
    if not 0 <= router_std < float("inf"):
        raise ValueError(f"`router_std` must be 0 or more, got {router_std!r}.")
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be 1 or more, got {max_shard_bytes!r}.")


def _chosen_layers(pair: Pair, count: int, layers: Sequence[int] | None) -> frozenset[int]:
    chosen = frozenset(range(count) if layers is None else layers)
    outside = sorted(layer for layer in chosen if type(layer) is not int or not 0 <= layer < count)
    if outside or not chosen:
        raise ValueError(f"`layers` must name some of the layers 0 to {count - 1}, got {layers!r}.")
    if len(chosen) < count and pair.target.dense_layers is None:
        raise ValueError(
            f"A {pair.target.model_type} model has a mixture in every layer, got `layers` = {sorted(chosen)}: "
            "leave it out."
        )
    return chosen


def _check_destination(plan: UpcyclingPlan) -> None:
    if plan.destination.resolve() == plan.source.resolve():
        raise ValueError(f"The destination must be another folder than the source, got `{plan.destination}`.")
    ours = {shard.name for shard in plan.shards}
    if (plan.destination / "config.json").exists():
        raise FileExistsError(f"`{plan.destination}` holds a model already. Choose another folder.")
    if plan.destination.is_dir():
        known = ("upcycle_journal.jsonl", "model.safetensors.index.json")
        others = sorted(
            entry.name
            for entry in plan.destination.iterdir()
            if entry.name.removesuffix(".partial").removesuffix(".lock") not in {*ours, *known}
        )
        if others and not (plan.destination / known[0]).exists():
            raise FileExistsError(f"`{plan.destination}` holds other files ({others[0]}). Choose a new folder.")
