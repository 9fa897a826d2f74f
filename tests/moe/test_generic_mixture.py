"""GPT-2, BERT, RoBERTa, ViT and T5 encoders become mixtures of experts that compute the same."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sparse_hf.moe.generic_check import largest_generic_difference
from sparse_hf.moe.modeling_mixture import MixtureBlock, base_of
from tiny_mixtures import VARIANTS, convert, tiny_dense
from tiny_models import tiny_inputs


FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def make(folder, variant, dtype=torch.float32, changes=(), **options):
    """The dense model and the mixture as the auto class loads it."""
    dense = tiny_dense(variant, **dict(changes)).to(dtype)
    dense.config.dtype = dtype
    dense.save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "moe", **options)
    auto = getattr(transformers, VARIANTS[variant][3])
    mixture, info = auto.from_pretrained(folder / "moe", output_loading_info=True)
    assert not any(info[name] for name in FAULTS)
    return dense, mixture


def padded_inputs(model):
    inputs = tiny_inputs(model, batch=3)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, -3:] = 0
    return inputs


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def assert_equal(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def blocks(model):
    return [module for module in model.modules() if isinstance(module, MixtureBlock)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_is_kept_and_saving_changes_nothing(tmp_path, variant):
    dense, mixture = make(tmp_path, variant)
    assert type(mixture).__name__ == f"Mixture{type(dense).__name__}"
    assert len(blocks(mixture)) == 2
    inputs = padded_inputs(dense)
    assert_equal(outputs(mixture, inputs), outputs(dense, inputs))
    mixture.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = type(mixture).from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again, inputs), outputs(mixture, inputs))


@pytest.mark.parametrize("variant", ["gpt2", "bert", "roberta", "vit", "t5", "t5-gated"])
def test_bfloat16(tmp_path, variant):
    dense, mixture = make(tmp_path, variant, torch.bfloat16)
    routers = {f"{name}.weight" for name, _ in mixture.named_modules() if name.endswith("router")}
    assert len(routers) == 2
    for name, parameter in mixture.named_parameters():
        assert parameter.dtype == (torch.float32 if name in routers else torch.bfloat16)
    inputs = padded_inputs(dense)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    found, expected = outputs(mixture, inputs), outputs(dense, inputs)
    assert found.dtype == torch.bfloat16
    exact = outputs(
        dense.float(), {name: one.float() if one.is_floating_point() else one for name, one in inputs.items()}
    )
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()
    mixture.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert {name: one.dtype for name, one in ours.items()} == {name: one.dtype for name, one in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_experts_of_t5_stay_in_float32_where_its_own_output_layer_does(tmp_path):
    dense, _ = make(tmp_path, "t5-gated")
    found = AutoModel.from_pretrained(tmp_path / "moe", dtype=torch.float16)
    stock = transformers.T5EncoderModel.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    assert stock.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert {one.experts.down_proj.dtype for one in blocks(found)} == {torch.float32}
    inputs = padded_inputs(dense)
    assert_equal(outputs(found, inputs).float(), outputs(stock, inputs).float(), 2**-8)


@pytest.mark.parametrize("variant", ["gpt2", "bert", "vit", "t5", "t5-gated"])
def test_experts_implementations_agree(tmp_path, variant):
    dense, mixture = make(tmp_path, variant)
    with torch.no_grad():
        for block in blocks(mixture):
            block.experts.down_proj.add_(torch.arange(4.0)[:, None, None] / 10)  # experts that differ
    inputs = padded_inputs(dense)
    found = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        mixture.set_experts_implementation(name)
        assert blocks(mixture)[0].experts.config._experts_implementation == name
        found[name] = outputs(mixture, inputs)
    assert_equal(found["grouped_mm"], found["eager"])
    assert_equal(found["batched_mm"], found["eager"])
    asked = type(mixture).from_pretrained(tmp_path / "moe", experts_implementation="eager")
    assert asked.config._experts_implementation == "eager"


@pytest.mark.parametrize("variant", ["gpt2", "bert", "vit", "t5"])
def test_some_layers_stay_dense(tmp_path, variant):
    dense, mixture = make(tmp_path, variant, layers=(1,), experts=3, top_k=1)
    assert len(blocks(mixture)) == 1
    assert mixture.config.mixture_layers == [1]
    inputs = padded_inputs(dense)
    assert_equal(outputs(mixture, inputs), outputs(dense, inputs))


@pytest.mark.parametrize("cached", [True, False])
def test_gpt2_generates_the_same(tmp_path, cached):
    dense, mixture = make(tmp_path, "gpt2")
    inputs = tiny_inputs(dense)
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": cached}
    assert torch.equal(mixture.generate(**inputs, **options), dense.generate(**inputs, **options))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("variant", ["gpt2", "bert", "vit", "t5-gated"])
def test_gradients_reach_experts_and_routers_once_experts_differ(tmp_path, variant, implementation):
    dense, mixture = make(tmp_path, variant)
    mixture.set_experts_implementation(implementation)
    inputs = tiny_inputs(dense, batch=4)

    def gradients():
        mixture.zero_grad()
        mixture(**inputs)[0].square().mean().backward()
        found = blocks(mixture)
        return [one.router.weight.grad.abs().max().item() for one in found], found

    routers, found = gradients()
    for block in found:
        for name, parameter in block.experts.named_parameters():
            reached = parameter.grad.flatten(1).abs().sum(dim=1) > 0
            assert reached.any(), name
    with torch.no_grad():
        for block in found:
            # All differ: of the last layer of a ViT the task's loss sees one token, with its two experts.
            block.experts.down_proj.mul_(torch.arange(1, 5)[:, None, None])
    changed, _ = gradients()
    assert all(before < 1e-4 * after for before, after in zip(routers, changed, strict=True))


def test_hooks_see_the_logits_of_routers_in_float32(tmp_path):
    _, mixture = make(tmp_path, "bert")
    seen = []
    for block in blocks(mixture):
        block.router.register_forward_hook(lambda module, args, logits: seen.append((args[0], logits)))
    inputs = padded_inputs(mixture)
    with torch.autocast("cpu", torch.bfloat16):
        outputs(mixture, inputs)
    assert len(seen) == 2
    for block, (tokens, logits) in zip(blocks(mixture), seen, strict=True):
        assert logits.shape == (inputs["input_ids"].numel(), 4)
        assert torch.equal(logits, tokens.float() @ block.router.weight.T)


# Dropout that belongs to the FFN or follows it: path in a dense layer, path in a layer with a mixture.
DROPOUTS = {
    "gpt2": ("h.0.mlp.dropout", "h.0.mlp.dropout"),
    "bert": ("encoder.layer.0.output.dropout", "encoder.layer.0.output.dropout"),
    "vit": ("layers.0.dropout", "layers.0.dropout"),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.dropout", "encoder.block.0.layer.1.DenseReluDense.experts.dropout"),
    "t5-gated": (
        "encoder.block.0.layer.1.DenseReluDense.dropout",
        "encoder.block.0.layer.1.DenseReluDense.experts.dropout",
    ),
}


@pytest.mark.parametrize("variant", DROPOUTS)
def test_dropout_acts_as_before(tmp_path, variant):
    both = make(tmp_path, variant)
    inputs = tiny_inputs(both[0])
    found = []
    for model, path in zip(both, DROPOUTS[variant], strict=True):
        before = outputs(model, inputs)
        assert not any(module.training for module in model.modules())
        model.train()
        for module in model.modules():
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        dropout = base_of(model)[1].get_submodule(path)
        assert isinstance(dropout, torch.nn.Dropout)
        dropout.p = 1.0  # all of the FFN, or of its neurons, is lost
        found.append(outputs(model, inputs))
        assert not torch.allclose(found[-1], before, atol=1e-3)
    assert_equal(found[1], found[0])


def test_what_old_checkpoints_hold_besides(tmp_path):
    for variant, extra in (
        ("gpt2", ("transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias")),
        ("bert", ("bert.embeddings.position_ids",)),
    ):
        folder = tmp_path / variant
        dense = tiny_dense(variant)
        dense.save_pretrained(folder / "dense")
        path = folder / "dense" / "model.safetensors"
        weights = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): one for name, one in load_file(path).items()}
        weights |= {name: torch.zeros(2) for name in extra}
        save_file(weights, path, metadata={"format": "pt"})
        convert(folder / "dense", folder / "moe")
        auto = getattr(transformers, VARIANTS[variant][3])
        mixture, info = auto.from_pretrained(folder / "moe", output_loading_info=True)
        assert not any(info[name] for name in FAULTS)
        inputs = padded_inputs(dense)
        assert_equal(outputs(mixture, inputs), outputs(dense, inputs))


@pytest.mark.parametrize("variant", ["gpt2", "bert", "roberta", "vit-base", "t5-gated"])
def test_the_check_sees_changed_experts(tmp_path, variant):
    make(tmp_path, variant)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert largest_generic_difference(tmp_path / "dense", tmp_path / "moe", config, 32, 0) < 1e-5
    path = tmp_path / "moe" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("experts.down_proj"))
    weights[name][:3] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})
    assert largest_generic_difference(tmp_path / "dense", tmp_path / "moe", config, 32, 0) > 1e-3


def test_a_head_can_be_changed(tmp_path):
    dense, _ = make(tmp_path, "gpt2-base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    inputs = padded_inputs(dense)
    assert_equal(outputs(model.transformer, inputs), outputs(dense, inputs))
