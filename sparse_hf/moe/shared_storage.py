"""How does a mixture of identical experts fit into the memory of the dense model? Its experts are stored once.

All experts of a fresh upcycling are the same matrix, so the parameter of shape (experts, ...) can be one matrix with
an expert axis of stride 0. It cannot be trained, because a step on one expert would be a step on all of them; what
makes experts differ is an adapter with low-rank factors per expert, and `export_merged` writes the sum.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sparse_hf.moe.fingerprint import fingerprint
from sparse_hf.moe.keep_shared import keep_shared
from sparse_hf.moe.memory_names import expert_places, expert_targets, memory_name, router_module
from sparse_hf.moe.plan_upcycling import UpcyclingPlan, plan_upcycling
from sparse_hf.moe.read_mixture import TARGETS
from sparse_hf.storage.piece_bytes import SourceFiles, piece_blocks
from sparse_hf.storage.pieces import Piece


TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NOWHERE = Path("nowhere")  # a plan has a destination; this one writes nothing


def load_with_shared_experts(
    source: str | Path,
    experts: int = 8,
    top_k: int = 2,
    layers: Sequence[int] | None = None,
    router_std: float = 0.02,
    seed: int = 0,
    target: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The mixture that `upcycle` would write with the same arguments, in about the memory of the dense model.

    A stock Transformers model, made from the dense checkpoint's bytes: the experts, equal in every number, are stored
    once, by an expert axis of stride 0, and the copies never exist. Routers have the numbers that `upcycle` writes.
    The experts' parameters are frozen; Transformers' experts implementations (eager, grouped_mm, batched_mm) compute
    with them. A target's idle shared expert (GLM-4-MoE, Dots1, HunYuan: as wide as the FFN) comes on top.

    To train, give every expert low-rank factors of its own::

        model = load_with_shared_experts("Qwen/Qwen3-8B", experts=8, top_k=2)
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **expert_lora_targets(model)))
        Trainer(model=model, ...).train()
        model.save_pretrained("adapter")  # the adapter alone
        export_merged("adapter", "out")  # a native checkpoint, W_e = W + scaling B_e A_e

    What keeps the experts shared: `.to()` another dtype or device, so Trainer's and accelerate's placement too;
    gradient checkpointing; DistributedDataParallel, around this model or PEFT's. What does not, and its way out:

    - In its forward pass PEFT computes W + B_e A_e for all experts of a layer, and autograd keeps that for the
      backward pass: of one layer at a time with gradient checkpointing, of all layers without it. So turn it on.
    - `model.save_pretrained` is refused: `upcycle` writes the mixture, `export_merged` the trained one.
    - PEFT's `merge_and_unload` fails in torch, or makes real copies with `safe_merge=True`: use `export_merged`.
    - `copy.deepcopy` makes real copies: load a second model.
    - The experts themselves cannot be trained: a forward pass is refused once they require gradients.
    - FSDP and DeepSpeed ZeRO-3 flatten or gather parameters; they were not tried.

    Args:
        source: folder or Hub id of a dense checkpoint in safetensors.
        experts: of every mixture.
        top_k: experts per token.
        layers: which layers become mixtures; all by default.
        router_std: standard deviation of the routers' normal start; 0 for zeros.
        seed: of the routers.
        target: `model_type` of the mixture; see `upcycle`.
        dtype: of the model; as stored by default.
        device: where the model is made; nothing larger than one tensor is on the CPU on the way.

    Raises:
        FileNotFoundError, ValueError: see `plan_upcycling`; or the checkpoint lacks tensors, or has too many.
    """
    chosen = None if layers is None else list(layers)
    options = {"experts": experts, "top_k": top_k, "layers": chosen, "router_std": float(router_std), "seed": seed}
    plan = plan_upcycling(source, NOWHERE, **options, target=target)
    model = _empty_model(plan, str(source), dtype)
    with SourceFiles() as files, torch.no_grad():
        shared = _fill(model, plan, files, torch.device(device))
    _require_everything(model)
    keep_shared(model, shared)
    if (plan.source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(plan.source)
    record = {**options, "target": plan.pair.target.model_type, "base": fingerprint(plan.source)}
    model.config.shared_experts = record
    return model.eval()


def expert_lora_targets(model: PreTrainedModel, routers: bool = True) -> dict[str, object]:
    """What PEFT's `LoraConfig` has to be told for low-rank factors per expert: `LoraConfig(r=8, **this)`.

    Beside the targets, `auto_mapping` records which upcycling the adapter belongs to, which PEFT saves with it and
    `export_merged` reads. Add `target_modules` in place of the empty list to adapt linear layers too.

    Args:
        model: of `load_with_shared_experts`.
        routers: whether routers are trained whole (`modules_to_save`).

    Raises:
        ValueError: the model has no shared experts.
    """
    record = getattr(model.config, "shared_experts", None)
    if record is None:
        raise ValueError(f"A model of `load_with_shared_experts` is needed, got a {type(model).__name__} without it.")
    target = TARGETS[record["target"]]
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": [],
        "target_parameters": expert_targets(target),
        "modules_to_save": [router_module(target)] if routers else None,
        "auto_mapping": {"sparse_hf": record},
    }


def _empty_model(plan: UpcyclingPlan, name: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Without numbers, but for buffers that no checkpoint holds (rotary frequencies), which their modules make."""
    plan.config._name_or_path = name  # PEFT writes it into the adapter
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan.config, dtype=dtype or plan.config.dtype)
    for module in model.modules():
        if lacking := [one for one in module._non_persistent_buffers_set if module._buffers[one] is not None]:
            fresh = type(module)(config=model.config)
            for one in lacking:
                setattr(module, one, getattr(fresh, one))
    return model


def _fill(model: PreTrainedModel, plan: UpcyclingPlan, files: SourceFiles, device: torch.device) -> set[str]:
    """Give the model the plan's numbers, tensor by tensor; the modules whose experts are shared."""
    target = plan.pair.target
    places = expert_places(target, plan.all_layers, getattr(plan.config, target.count))
    parts: dict[str, dict[int, Piece]] = {}
    dtypes = {}
    for tensor in (tensor for shard in plan.shards for tensor in shard.tensors):
        if tensor.name not in places:
            numbers = _numbers(tensor.pieces, tensor.dtype, tensor.shape, files)
            _put(model, memory_name(tensor.name), tensor.name, numbers, device)
            continue
        for place, piece in zip(places[tensor.name], tensor.pieces, strict=True):
            dtypes[place.parameter] = tensor.dtype
            if parts.setdefault(place.parameter, {}).setdefault(place.part, piece) != piece:
                raise ValueError(f"Experts must be identical to be stored once, but `{tensor.name}` is another.")
    for name, pieces in parts.items():
        shape = model.get_parameter(name).shape[1:]
        numbers = _numbers([pieces[part] for part in sorted(pieces)], dtypes[name], shape, files)
        _put(model, name, name, numbers, device)
    for buffer_name, buffer in model.named_buffers():
        if not buffer.is_meta:
            module, _, name = buffer_name.rpartition(".")
            setattr(model.get_submodule(module), name, buffer.to(device))
    model.tie_weights()
    return {name.rpartition(".")[0] for name in parts}


def _numbers(pieces: Sequence[Piece], dtype: str, shape: Sequence[int], files: SourceFiles) -> Tensor:
    """The pieces' bytes as a tensor on the CPU.

    Raises:
        ValueError: a dtype that no model is loaded in, or another size.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"Weights must be {', '.join(TORCH_DTYPES)} to be loaded, got {dtype}: convert them.")
    numbers = torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype])
    data = memoryview(numbers.view(-1).view(torch.uint8).numpy())
    end = 0
    for block in (block for piece in pieces for block in piece_blocks(piece, files)):
        data[end : end + len(block)] = block
        end += len(block)
    return numbers


def _put(model: PreTrainedModel, name: str, stored: str, numbers: Tensor, device: torch.device) -> None:
    """In place of a tensor without numbers, in the dtype that the model's class wants there."""
    owner, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
        empty = module._parameters[last] if last in module._parameters else module._buffers[last]
    except (AttributeError, KeyError):
        raise ValueError(
            f"A {model.config.model_type} model must have a place for every tensor, but none for `{stored}`."
        ) from None
    numbers = numbers.to(device, empty.dtype)
    if last in module._buffers:
        module._buffers[last] = numbers
        return
    shared = empty.ndim == numbers.ndim + 1
    numbers = numbers.expand(empty.shape) if shared else numbers.view(empty.shape)
    module._parameters[last] = nn.Parameter(numbers, requires_grad=empty.requires_grad and not shared)


def _require_everything(model: PreTrainedModel) -> None:
    lacking = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if lacking:
        raise ValueError(f"The checkpoint must hold every weight, {len(lacking)} are missing: {lacking[0]} ...")
