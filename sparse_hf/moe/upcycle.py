"""Turn a dense checkpoint into a mixture of experts that stock Transformers and engines load."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sparse_hf.moe.expert_init import ExpertInit
from sparse_hf.moe.generic_check import largest_generic_difference
from sparse_hf.moe.layerwise_check import compare_layer_by_layer, fp32_tolerance
from sparse_hf.moe.mixture_routers import RouterConfig
from sparse_hf.moe.new_checkpoint import complete_folder, write_weights
from sparse_hf.moe.plan_upcycling import SHARD_BYTES, UpcyclingPlan, plan_upcycling
from sparse_hf.storage.locations import hub_source


def upcycle(
    source: str | Path,
    destination: str | Path,
    experts: int = 8,
    top_k: int = 2,
    layers: Sequence[int] | str | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    check_tokens: int = 256,
    progress: bool = True,
    target: str | None = None,
    init: ExpertInit | None = None,
    branches: Sequence[str | Path] = (),
    average: bool = False,
    router_rows: Mapping[int, np.ndarray] | None = None,
    check_text: str | None = None,
    router: RouterConfig | None = None,
    untie: bool = False,
) -> UpcyclingPlan:
    """Write a mixture of experts made of a dense checkpoint, by default of exact copies (Komatsuzaki et al. 2022).

    The target is a stock architecture with the names that its own checkpoints have on the Hub, so that Transformers,
    vLLM and SGLang read it with no code of ours (docs/upcycling.md tells which pairs they were seen to read). GPT-2,
    BERT, RoBERTa, ViT and T5 encoders, which have no such sibling, get a mixture of ours that the Auto classes load.
    Weights are copied block by block; no model is held in memory but for the check at the end. Called again after a
    kill it goes on, and the files are those of an uninterrupted run, byte for byte. Several processes may be called
    alike and share the shards; the last to finish completes the folder. It can be loaded only once everything is
    written and checked.

    Args:
        source: folder or Hub id of a dense checkpoint in safetensors.
        destination: a new folder.
        experts: copies of each FFN; with `init.granularity` G each is cut into G experts.
        top_k: experts per token; 1 leaves routers without any gradient from the language-model loss, for ever. With
            granularity G a multiple of it, G for the dense FFN's FLOPs.
        layers: which layers become mixtures, by number or as "4-31", "every-2" or "0,3,5-7"; all by default. Only
            Qwen2-MoE and Qwen3-MoE can leave layers dense.
        router_std: standard deviation of the routers' normal start; 0 for zeros. Relative to `router_rows`, if given.
        seed: of the routers and of the check's tokens.
        max_shard_bytes: of one file.
        check_tokens: how many tokens the logits of both models are compared on, layer by layer in the memory of one
            layer in fp32 (a mixture of ours: both whole, one after the other); 0 skips it.
        progress: show a bar.
        target: `model_type` of the mixture, where a family has several that are exact (Llama, Mistral and Qwen2 also
            become "glm4_moe", Qwen3 that and "dots1"); by default the one that most engines have had for longest.
        init: how experts begin otherwise: cut into parts, beside a shared half, partly drawn anew, with noise.
        branches: folders or Hub ids of models fine-tuned from the source, whose FFNs become the experts in turn
            (branch-train-mix, Sukhbaatar et al. 2024); everything else is the source's.
        average: whether everything else is the branches' mean instead.
        router_rows: what `fit_routers` found, instead of a random start.
        check_text: to compare on, read with the source's tokenizer; random tokens by default.
        router: another kind of router, for the mixtures of ours; stock architectures have their own.
        untie: give tied output embeddings a copy of their own, for engines that do not tie them (SGLang's mixtral,
            qwen2_moe, qwen3_moe and glm4_moe compute nonsense otherwise); trained, they become two.

    Raises:
        FileNotFoundError, ValueError: see `plan_upcycling`; or the logits differ, and the folder stays without config.
        FileExistsError: the destination holds something else.
        OSError: the disk is full, or too small (refused before the first byte).
    """
    plan = plan_upcycling(
        source,
        destination,
        experts,
        top_k,
        layers,
        router_std,
        seed,
        max_shard_bytes,
        target,
        init,
        branches,
        average,
        router_rows,
        router,
        untie,
    )
    carry_out(plan, check_tokens, progress, seed, check_text)
    return plan


def carry_out(
    plan: UpcyclingPlan,
    check_tokens: int = 256,
    progress: bool = True,
    seed: int = 0,
    check_text: str | None = None,
) -> float | None:
    """Write what a plan says; see `upcycle`.

    Returns:
        The largest difference of the logits, as a fraction of the largest; None if they were not compared or other
        processes are not done yet.
    """
    if not write_weights(plan.source, plan.destination, plan.shards, plan.digest, progress):
        return None
    difference = _checked(plan, check_tokens, check_text, seed, progress) if check_tokens else None
    target = plan.pair.target
    base_model, revision = hub_source(plan.source)
    description = {
        "kind": "upcycled_model",
        "base_model": base_model,
        "base_revision": revision,
        "source_type": plan.pair.source,
        "target_type": target.model_type,
        "experts": getattr(plan.config, target.count),
        "top_k": getattr(plan.config, target.top_k),
        "init": asdict(plan.mixture.init),
        "exact": plan.changed is None,
        "digest": plan.digest,
        "logits_difference": difference,
    }
    complete_folder(plan.source, plan.destination, plan.config.to_dict(), description, plan.code)
    return difference


def _checked(plan: UpcyclingPlan, tokens: int, text: str | None, seed: int, progress: bool) -> float:
    """The largest difference of the logits, as a fraction of the largest; refused where there should be none."""
    options = {"tokens": tokens, "seed": seed}
    if not plan.code:
        found = compare_layer_by_layer(
            plan.source, plan.destination, plan.config, **options, text=text, progress=progress
        )
        difference, allowed, where = found.logits, found.logits_tolerance, found.first_wrong_layer
    else:
        difference = largest_generic_difference(plan.source, plan.destination, plan.config, **options)
        allowed, where = fp32_tolerance(plan.all_layers), None
    if not plan.changed and not difference <= allowed:
        place = "" if where is None else f" and layer {where} is the first to differ"
        raise ValueError(
            f"The logits of the mixture must be those of the dense model to {allowed:g} of the largest, got "
            f"{difference:.2g}{place}. `{plan.destination}` is left without a config, so that nothing loads it."
        )
    return difference
