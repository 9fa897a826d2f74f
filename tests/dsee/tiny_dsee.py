"""Tiny models with DSEE adapters: a BERT classifier (`nn.Linear`), GPT-2 (`Conv1D`) and Llama."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_hf.dsee.config import DseeConfig
from sparse_hf.dsee.layer import DseeLayer
from tiny_models import tiny_inputs, tiny_model


torch.set_num_threads(1)

R, NNZ = 2, 20
# For the task SEQ_CLS PEFT would train and save the classifier too, so BERT's is left out unless a test asks for it.
# family -> (head, PEFT's name of the task, target modules, other target modules, head that is saved whole)
FAMILIES = {
    "bert": ("sequence_classification", None, ["query", "value"], ["value", "intermediate.dense"], "classifier"),
    "gpt2": ("causal_lm", "CAUSAL_LM", ["c_attn"], ["c_attn", "c_fc"], "ln_f"),
    "llama": ("causal_lm", "CAUSAL_LM", ["q_proj", "v_proj"], ["v_proj", "down_proj"], "norm"),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def base_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model in eval mode; equal for equal arguments."""
    return tiny_model(family, FAMILIES[family][0], seed=seed, **changes)


def dsee_config(family: str, other: bool = False, **changes: object) -> DseeConfig:
    """Rank 2, 20 entries, half of the frozen weights masked; `other` targets other modules."""
    _, task, targets, other_targets, _ = FAMILIES[family]
    defaults = dict(r=R, nnz=NNZ, base_sparsity=0.5, task_type=task)
    return DseeConfig(**{**defaults, "target_modules": list(other_targets if other else targets), **changes})


def dsee_model(family: str, stirred: bool = True, base: PreTrainedModel | None = None, **changes: object) -> PeftModel:
    """A tiny model with an adapter that is not the identity if `stirred`; `changes` go to its config."""
    model = get_peft_model(base or base_model(family), dsee_config(family, **changes)).eval()
    return stir(model) if stirred else model


@torch.no_grad()
def stir(model: PeftModel, seed: int = 1, adapter: str = "default") -> PeftModel:
    """Give an adapter's trained values random numbers, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for part in (layer.sparse_hf_dsee_U, layer.sparse_hf_dsee_V, layer.sparse_hf_dsee_values):
            if adapter in part:
                part[adapter].copy_(0.1 * torch.randn(part[adapter].shape, generator=generator))
    return model


def layers(model: nn.Module) -> dict[str, DseeLayer]:
    """The adapted matrices by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DseeLayer)}


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """What the model says of two rows."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return model(**tiny_inputs(core, seed=seed)).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the stock model's tensors, by their stock names, as the adapters left them."""
    own = "sparse_hf_dsee_"
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if own not in name
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal names, and bit-equal tensors, the sign of zeros included."""
    assert first.keys() == second.keys()
    differing = [
        name
        for name, one in first.items()
        if not torch.equal(one, second[name])
        or (one.is_floating_point() and not torch.equal(one.signbit(), second[name].signbit()))
    ]
    assert not differing, differing


def adapter_tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """A copy of what an adapter holds."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "sparse_hf_dsee_" in name and name.endswith(f".{adapter}")
    }


def effective(layer: DseeLayer, w0: Tensor, adapter: str = "default") -> Tensor:
    """W0 ⊙ S1 + scaling (U V + S2) as the paper has it, from what is stored; in float64 and W0's layout."""
    mask = torch.ones(w0.numel(), dtype=torch.bool)
    if adapter in layer.sparse_hf_dsee_mask:
        stored = layer.sparse_hf_dsee_mask[adapter]
        mask = torch.stack([(stored >> bit) & 1 for bit in range(8)], dim=1).flatten()[: w0.numel()].bool()
    update = torch.zeros(w0.shape, dtype=torch.float64)
    if adapter in layer.sparse_hf_dsee_U:
        low_rank = layer.sparse_hf_dsee_U[adapter].double() @ layer.sparse_hf_dsee_V[adapter].double()
        update += low_rank.t() if layer.input_first else low_rank
    if adapter in layer.sparse_hf_dsee_values:
        places = layer.sparse_hf_dsee_indices[adapter].long()
        update.view(-1)[places] += layer.sparse_hf_dsee_values[adapter].detach().double()
    return w0.double() * mask.view(w0.shape) + layer.sparse_hf_dsee_scaling[adapter] * update.detach()
