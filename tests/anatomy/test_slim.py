"""Is a cut model the model with its cut heads and neurons multiplied by zero, only smaller?"""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_hf.anatomy.slim import cut_units
from sparse_hf.anatomy.units import find_units
from tiny_models import tiny_inputs, tiny_model
from tiny_slim import VARIANTS, ragged_masks, tiny_variant


def multiplied(model: PreTrainedModel, masks: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The output of the whole `model` with every head and neuron times its mask, as coefficients would do it."""
    handles = []
    for unit in find_units(model):
        factor = masks[unit.key].repeat_interleave(unit.width)
        hook = lambda module, args, factor=factor: (args[0] * factor.to(args[0]),)  # noqa: E731
        handles.append(model.get_submodule(unit.output).register_forward_pre_hook(hook))
    try:
        return model(**inputs)[0]
    finally:
        for handle in handles:
            handle.remove()


def padded_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = tiny_inputs(model)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 5:] = 0
    return inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cut_equals_multiplied_by_zero(variant, attention):
    model = tiny_variant(variant, attn_implementation=attention)
    inputs, masks = padded_inputs(model), ragged_masks(model)
    smaller = cut_units(model, masks)
    assert smaller.config._attn_implementation == model.config._attn_implementation == attention
    assert smaller.num_parameters() < model.num_parameters()
    output = smaller(**inputs)[0]
    assert (output - multiplied(model, masks, inputs)).abs().max() <= 1e-6
    whole = model(**inputs)[0]
    assert (output - whole).abs().max() > 1e-3
    # ... and each kind of unit is really there: its masks alone change the output.
    for kind in ("heads", "neurons"):
        alone = {key: mask | (not key.endswith(kind)) for key, mask in masks.items()}
        assert (multiplied(model, alone, inputs) - whole).abs().max() > 1e-3
        assert (cut_units(model, alone)(**inputs)[0] - multiplied(model, alone, inputs)).abs().max() <= 1e-6


ALL = r"\.(weight|bias)$"
# (what the name matches, kind, axis of the weight, fused parts), by hand; a bias has one axis.
CUTS = [
    (rf"attention\.self\.(query|key|value){ALL}|attention\.[qkv]_(lin|proj){ALL}", "heads", 0, 1),
    (rf"self_attn\.[qkv]_proj{ALL}|encoder.*SelfAttention\.[qkv]{ALL}", "heads", 0, 1),
    (r"(attention\.output\.dense|attention\.(out_lin|o_proj)|self_attn\.o_proj)\.weight", "heads", 1, 1),
    (r"encoder.*(SelfAttention\.o|relative_attention_bias)\.weight", "heads", 1, 1),
    (rf"attn\.c_attn{ALL}", "heads", 1, 3),
    (r"attn\.c_proj\.weight", "heads", 0, 1),
    (rf"(intermediate\.dense|ffn\.lin1|mlp\.(fc1|gate_proj|up_proj)|encoder.*\.wi(_[01])?){ALL}", "neurons", 0, 1),
    (r"(layer\.\d\.output\.dense|ffn\.lin2|mlp\.(fc2|down_proj)|encoder.*\.wo)\.weight", "neurons", 1, 1),
    (rf"mlp\.c_fc{ALL}", "neurons", 1, 1),
    (r"mlp\.c_proj\.weight", "neurons", 0, 1),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_a_slice_of_the_source(variant):
    model = tiny_variant(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = ragged_masks(model)
    smaller = cut_units(model, masks)
    cuts = 0
    for name, parameter in smaller.named_parameters(remove_duplicate=False):
        # Every T5 layer has its own columns of the position bias, which is the first layer's.
        source = before[re.sub(r"encoder\.block\.\d(.*relative)", r"encoder.block.0\1", name)]
        for pattern, kind, axis, parts in CUTS:
            if re.search(pattern, name):
                (mask,) = (
                    mask for key, mask in masks.items() if key.endswith(kind) and key.rpartition(".")[0] in name
                )
                axis = min(axis, source.dim() - 1)
                width = source.shape[axis] // (len(mask) * parts)
                rows = mask.repeat_interleave(width).repeat(parts)
                source = source[rows] if axis == 0 else source[:, rows]
                cuts += 1
                break
        assert torch.equal(parameter, source), name
    per_layer = {"bert": 10, "distilbert": 10, "vit": 10, "roberta": 10, "gpt2": 6, "llama-tied": 12, "qwen2": 10}
    assert cuts == 2 * per_layer.get(variant, 7 + ("t5" in variant) - (variant in ("t5", "t5-encoder")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.num_parameters() == tiny_variant(variant).num_parameters()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_shared_with_the_source_and_buffers_are_copied(variant):
    model = tiny_variant(variant)
    smaller = cut_units(model, ragged_masks(model))
    old = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert not old & {tensor.untyped_storage().data_ptr() for tensor in [*smaller.parameters(), *smaller.buffers()]}
    buffers = dict(model.named_buffers())
    assert set(buffers) == {name for name, _ in smaller.named_buffers()}
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in smaller.named_buffers())
    left = [value for module in smaller.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert not any(tensor.is_meta for tensor in [*smaller.parameters(), *smaller.buffers(), *left])
    assert smaller.config is not model.config
    assert smaller.config.id2label == model.config.id2label
    assert not hasattr(model.config, "slim")


@pytest.mark.parametrize("variant", ["gpt2", "llama-tied", "roberta", "t5"])
def test_ties_survive(variant):
    model = tiny_variant(variant)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    smaller = cut_units(model, ragged_masks(model))
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight
    untied = cut_units(tiny_variant("llama"), ragged_masks(tiny_variant("llama")))
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def test_sizes_beside_the_weights_are_told():
    for variant in ("bert", "gpt2", "t5-encoder"):
        for module in cut_units(model := tiny_variant(variant), ragged_masks(model)).modules():
            if isinstance(module, nn.Linear):
                assert (module.out_features, module.in_features) == tuple(module.weight.shape)
            elif type(module).__name__ == "Conv1D":
                assert (module.nx, module.nf) == tuple(module.weight.shape)


@pytest.mark.parametrize(
    ("variant", "path", "counts"),
    [
        ("bert", "bert.encoder.layer.{}.attention.self", {"num_attention_heads": (1, 3), "all_head_size": (8, 24)}),
        ("distilbert", "distilbert.transformer.layer.{}.attention", {"n_heads": (1, 3)}),
        ("vit", "vit.layers.{}.attention", {"num_attention_heads": (1, 3)}),
        ("gpt2", "transformer.h.{}.attn", {"num_heads": (1, 3), "split_size": (8, 24), "head_dim": (8, 8)}),
        ("t5", "encoder.block.{}.layer.0.SelfAttention", {"n_heads": (1, 3), "inner_dim": (8, 24)}),
    ],
)
def test_modules_that_say_their_number_of_heads_say_the_new_one(variant, path, counts):
    smaller = cut_units(model := tiny_variant(variant), ragged_masks(model))
    modules = [smaller.get_submodule(path.format(number)) for number in (0, 1)]
    assert {name: tuple(getattr(module, name) for module in modules) for name in counts} == counts


def test_frozen_dtype_and_mode_are_kept():
    model = tiny_variant("bert").to(torch.bfloat16).train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    smaller = cut_units(model, ragged_masks(model))
    assert smaller.training
    assert all(module.training for module in smaller.modules())
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16} == {smaller.dtype}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in smaller.named_parameters() if not parameter.requires_grad} == frozen
    model.eval()
    assert not any(module.training for module in cut_units(model, ragged_masks(model)).modules())


def test_generation_config_is_copied():
    model = tiny_variant("llama")
    model.generation_config.max_new_tokens = 3
    smaller = cut_units(model, ragged_masks(model))
    assert smaller.generation_config.max_new_tokens == 3
    assert smaller.generation_config is not model.generation_config


@pytest.mark.parametrize("variant", ["bert", "gpt2", "llama", "t5-gated"])
@torch.no_grad()
def test_cutting_twice_is_cutting_once(variant):
    model = tiny_variant(variant)
    first = ragged_masks(model)
    middle = cut_units(model, first)
    second = {one.key: torch.arange(one.count) >= one.count // 3 for one in find_units(middle)}
    both = {key: mask.clone().masked_scatter(mask, second[key]) for key, mask in first.items()}
    assert all(both[key].sum() == second[key].sum() for key in both)
    twice, once = cut_units(middle, second), cut_units(model, both)
    assert type(twice) is type(once)
    assert twice.config.to_dict() == once.config.to_dict()
    state = once.state_dict()
    assert set(state) == set(twice.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in twice.state_dict().items())
    inputs = padded_inputs(model)
    assert torch.equal(twice(**inputs)[0], once(**inputs)[0])


def test_a_mask_on_all_units_copies_the_model():
    model = tiny_model("t5", "seq2seq_lm")
    copy = cut_units(model, {one.key: torch.ones(one.count, dtype=torch.bool) for one in find_units(model)})
    assert type(copy) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in copy.state_dict().items())
