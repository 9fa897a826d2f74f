"""What DSEE refuses, and what it says."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dsee.tiny_dsee import FAMILY, base_model, dsee_config, dsee_model, layers, logits
from sparse_hf.dsee.config import DseeConfig
from tiny_models import tiny_inputs


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"r": 0, "nnz": 0}, "`r` and `nnz` are both 0, so nothing would be trained"),
        ({"r": -1}, "`r` must be a whole number of at least 0, got -1"),
        ({"nnz": 2.5}, "`nnz` must be a whole number of at least 0, got 2.5"),
        ({"nnz": True}, "`nnz` must be a whole number of at least 0, got True"),
        ({"base_sparsity": 1.0}, r"`base_sparsity` must be in \[0, 1\), got 1.0"),
        ({"base_sparsity": float("nan")}, r"`base_sparsity` must be in \[0, 1\), got nan"),
        ({"dropout": -0.1}, r"`dropout` must be in \[0, 1\), got -0.1"),
        ({"support": "largest"}, "`support` must be one of magnitude, .*, got 'largest'"),
        ({"on_other_base": "ignore"}, "`on_other_base` must be one of warn, raise, got 'ignore'"),
        ({"base_pattern": "4:4"}, '`base_pattern` must be "N:M" with 0 < N < M'),
        ({"base_pattern": "2 of 4"}, '`base_pattern` must be "N:M"'),
        ({"base_pattern": "2:4", "base_sparsity": 0.5}, "pass one of them"),
        ({"alpha": float("inf")}, "`alpha` must be a finite number, got inf"),
        ({"alpha": "16"}, "`alpha` must be a finite number, got '16'"),
    ],
)
def test_a_config_out_of_range(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        DseeConfig(**arguments)


@FAMILY
def test_more_entries_than_weights(family):
    shape = r"\(32, 96\)" if family == "gpt2" else r"\(\d+, 32\)"
    with pytest.raises(
        ValueError, match=rf"`nnz` must be at most \d+, the weights of a target matrix of shape {shape}"
    ):
        get_peft_model(base_model(family), dsee_config(family, nnz=10**6))


@pytest.mark.parametrize("support", ["rows", "columns"])
def test_entries_that_fill_no_whole_line(support):
    with pytest.raises(ValueError, match="nnz"):
        get_peft_model(base_model("bert"), dsee_config("bert", support=support, nnz=33))


def test_a_pattern_that_does_not_divide_the_input():
    with pytest.raises(ValueError, match="a multiple of 5, got 32 along dimension 1"):
        get_peft_model(base_model("bert"), dsee_config("bert", base_sparsity=0.0, base_pattern="2:5"))


@pytest.mark.parametrize("target", ["word_embeddings", "LayerNorm"])
def test_a_module_that_is_not_linear(target):
    with pytest.raises(TypeError, match=f"got (Embedding|LayerNorm) at `.*{target}`: leave it out"):
        get_peft_model(base_model("bert"), dsee_config("bert", target_modules=[target]))


def test_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="got Conv2d at `0`"):
        get_peft_model(model, DseeConfig(target_modules=["0"], nnz=2))


@FAMILY
def test_a_batch_of_several_adapters(family):
    model = dsee_model(family)
    with pytest.raises(ValueError, match="call `set_adapter` instead"):
        model(**tiny_inputs(model.get_base_model()), adapter_names=["default", "default"])


def spoil(folder, change):
    """Let `change` alter the first tensor of every kind in an adapter's file."""
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path, metadata={"format": "pt"})


def first(held, kind):
    return next(name for name in held if name.endswith(f"sparse_hf_dsee_{kind}"))


def set_index(position, value):
    def change(held):
        held[first(held, "indices")][position] = value

    return change


def repeat(held):
    held[first(held, "indices")][1] = held[first(held, "indices")][0]


TAMPERED = {
    "too large": (set_index(-1, 10**6), r"must be in 0\.\.\d+, the weights of the matrix"),
    "negative": (set_index(0, -1), "matrix, got -1"),
    "repeated": (repeat, "must not repeat"),
}


@FAMILY
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_indices_are_refused_by_peft(family, kind, low_cpu_mem_usage, tmp_path):
    dsee_model(family).save_pretrained(tmp_path)
    change, problem = TAMPERED[kind]
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=problem):
        PeftModel.from_pretrained(base_model(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@FAMILY
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_indices_are_refused_by_transformers(family, kind, is_trainable, tmp_path):
    dsee_model(family).save_pretrained(tmp_path)
    change, problem = TAMPERED[kind]
    spoil(tmp_path, change)
    model = base_model(family)

    def load_and_use():  # in eval mode the first look is taken while loading, for training in the first forward
        model.load_adapter(tmp_path, is_trainable=is_trainable)
        logits(model)

    with pytest.raises(ValueError, match=problem):
        load_and_use()


def test_tampered_indices_are_refused_in_a_state_dict():
    model = dsee_model("bert")
    held = {name: one.clone() for name, one in model.state_dict().items() if name.endswith("indices.default")}
    next(iter(held.values()))[0] = -1
    with pytest.raises(ValueError, match="matrix, got -1"):
        model.load_state_dict(held, strict=False)


def drop(kind):
    def change(held):
        del held[first(held, kind)]

    return change


def shorten(kind):
    def change(held):
        name = first(held, kind)
        held[name] = held[name][:-1].clone()

    return change


def add_another(held):
    name = first(held, "values")
    held[name.replace(".layer.0.", ".layer.7.")] = held[name].clone()


@pytest.mark.parametrize("kind", ["U", "V", "values", "indices", "mask"])
def test_a_file_that_lacks_a_tensor(kind, tmp_path):
    dsee_model("bert").save_pretrained(tmp_path)
    spoil(tmp_path, drop(kind))
    with pytest.raises(ValueError, match=f"1 tensors in only one of them .*{kind}.default"):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)


@pytest.mark.parametrize("kind", ["U", "V", "values", "indices", "mask"])
def test_a_file_of_other_shapes(kind, tmp_path):
    dsee_model("bert").save_pretrained(tmp_path)
    spoil(tmp_path, shorten(kind))
    with pytest.raises(ValueError, match=rf"{kind}.default` must have shape .* by the adapter's config"):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="shape|mismatch|size"):
        base_model("bert").load_adapter(tmp_path)


def test_a_file_that_holds_more_than_the_adapter(tmp_path):
    dsee_model("bert").save_pretrained(tmp_path)
    spoil(tmp_path, add_another)
    with pytest.raises(ValueError, match="1 tensors in only one of them"):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)


def test_bits_beyond_the_mask(tmp_path):
    base = nn.Sequential(nn.Linear(3, 3))
    config = {"target_modules": ["0"], "nnz": 2, "r": 1, "base_sparsity": 0.5}
    get_peft_model(base, DseeConfig(**config)).save_pretrained(tmp_path)
    spoil(tmp_path, lambda held: held[first(held, "mask")].fill_(255))
    with pytest.raises(ValueError, match="zero spare bits"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path)


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_another_base(way, tmp_path):
    dsee_model("bert", base_model_name_or_path=None).save_pretrained(tmp_path / "warn")
    dsee_model("bert", on_other_base="raise").save_pretrained(tmp_path / "raise")

    def load(folder, seed):
        base = base_model("bert", seed=seed)
        return PeftModel.from_pretrained(base, folder) if way == "peft" else base.load_adapter(folder)

    load(tmp_path / "raise", seed=0)
    with pytest.warns(UserWarning, match=r"Adapter `default` was trained on other base weights .* got [0-9a-f]{12}\)"):
        load(tmp_path / "warn", seed=1)
    with pytest.raises(ValueError, match="was trained on other base weights"):
        load(tmp_path / "raise", seed=1)


def test_a_mask_of_another_shape():
    layer = next(iter(layers(dsee_model("bert")).values()))
    with pytest.raises(ValueError, match=r"must have its weight's shape \(32, 32\), got \(32, 16\)"):
        layer.set_mask("default", torch.ones(32, 16, dtype=torch.bool))


def test_a_saved_config_without_its_file(tmp_path):
    dsee_model("bert", nnz=4).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(base_model("bert"), config)
    with pytest.raises(ValueError, match="whose file was not loaded"):
        logits(model.eval())
    config.base_fingerprint = None
    assert logits(get_peft_model(base_model("bert"), config)) is not None
