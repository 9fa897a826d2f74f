"""What one does with a model, done with a slim one: generate, compile, export, train."""

import pytest
import torch

from sparse_hf.anatomy.slim import cut_units
from tiny_models import tiny_inputs
from tiny_slim import VARIANTS, ragged_masks, tiny_variant


NO_DROPOUT = {
    "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "t5": dict(dropout_rate=0.0),
}


def cut_variant(variant, **changes):
    """A slim model whose layers have different numbers of heads, and inputs for it."""
    model = tiny_variant(variant, **changes)
    return cut_units(model, ragged_masks(model)), tiny_inputs(model)


DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize(
    ("variant", "cache"),
    # Of T5 only the encoder is cut: its decoder and cache are the stock ones.
    [
        ("t5", {}),
        *((name, {}) for name in DECODERS),
        *((name, {"cache_implementation": "static"}) for name in DECODERS),
    ],
)
def test_generation_with_a_cache_equals_generation_without(variant, cache):
    model, inputs = cut_variant(variant)
    inputs.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    without = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options, **cache), without)
    assert without.shape[1] == (9 if variant == "t5" else 16)
    assert not torch.equal(without[0], without[1])


@torch.no_grad()
def test_each_layer_caches_its_own_number_of_heads():
    model, inputs = cut_variant("llama")
    output = model(**inputs, use_cache=True)
    assert [layer.keys.shape[1] for layer in output.past_key_values.layers] == [1, 3]


@pytest.mark.parametrize(("variant", "backend"), [("gpt2", "aot_eager"), ("llama", "eager")])
@torch.no_grad()
def test_compiled_model_gives_the_same(variant, backend):
    torch.compiler.reset()
    model, inputs = cut_variant(variant)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-6)


def test_onnx_export_gives_the_same():
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, inputs = cut_variant("bert")
    program = torch.onnx.export(model, (inputs["input_ids"], inputs["attention_mask"]), dynamo=True, verbose=False)
    names = [entry.name for entry in program.model_proto.graph.input]
    values = (inputs["input_ids"].numpy(), inputs["attention_mask"].numpy())
    (exported,) = reference.ReferenceEvaluator(program.model_proto).run(None, dict(zip(names, values, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(exported), model(**inputs)[0], rtol=0, atol=1e-5)


def gradients(model, inputs):
    """The gradient of every parameter under a loss to which all contribute."""
    model.zero_grad()
    tensors = [tensor for tensor in model(**inputs).values() if isinstance(tensor, torch.Tensor)]
    sum(tensor.pow(3).mean() for tensor in tensors).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_trains_every_parameter(variant):
    model, inputs = cut_variant(variant)
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = gradients(model, inputs)
    assert [name for name in found if not found[name].any()] == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    # Softmax does not see what is added to all keys, so only rounding moves a key's bias (unless keys are rotated).
    assert all(name.endswith(("key.bias", "k_lin.bias", "k_proj.bias")) for name in still)


@pytest.mark.parametrize("variant", ["bert", "vit", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    model, inputs = cut_variant(variant, **NO_DROPOUT.get(variant, {}))
    model.train()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
