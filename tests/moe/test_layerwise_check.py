"""Two models compared one layer at a time: as if whole, in the memory of one layer, and where it goes wrong."""

import gc
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from sparse_hf.moe import one_layer
from sparse_hf.moe.layerwise_check import TOLERANCE, compare_layer_by_layer, fp32_tolerance
from sparse_hf.moe.pairs import PAIRS
from sparse_hf.moe.upcycle import upcycle
from sparse_hf.storage.tensor_headers import read_headers
from tiny_dense import save_dense
from tiny_models import tiny_model


ALL = [(source, pair.target.model_type) for source, pairs in PAIRS.items() for pair in pairs]
SLIDING, FULL = "sliding_attention", "full_attention"
FOUR = {"num_hidden_layers": 4}
# Layers that differ from each other; 24 tokens are more than the windows of 5.
DEEP = [
    ("cohere2", "cohere2_moe", {**FOUR, "layer_types": [SLIDING, FULL, SLIDING, SLIDING]}, {}),
    ("lfm2", "lfm2_moe", {**FOUR, "layer_types": ["conv", FULL, "conv", FULL]}, {}),
    ("smollm3", "mixtral", {**FOUR, "no_rope_layers": [1, 1, 1, 1]}, {"max_shard_bytes": 30_000}),
    ("mistral", "mixtral", {**FOUR, "sliding_window": 5, "tie_word_embeddings": True}, {}),
    ("mistral", "mixtral", {**FOUR, "sliding_window": 5, "tie_word_embeddings": False}, {}),
    ("qwen3", "qwen3_moe", {**FOUR, "tie_word_embeddings": True}, {"layers": [1, 2]}),
]
# What no mixture has, but dense models do.
DENSE_ONLY = [
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "layer_types": [SLIDING, FULL] * 2, "use_sliding_window": True}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "tie_word_embeddings": True}),
]


def make_pair(tmp_path, family="llama", target="mixtral", dtype=torch.float32, options=None, **changes):
    source, destination = tmp_path / "dense", tmp_path / "moe"
    save_dense(source, family, dtype, **changes)
    options = {"experts": 4, "router_std": 0.5, "check_tokens": 0, "progress": False, **(options or {})}
    plan = upcycle(source, destination, target=target, **options)
    return source, destination, plan.config


def spoil(folder, name, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    spoiled = change(weights.pop(name))
    save_file(weights if spoiled is None else {**weights, name: spoiled.clone()}, path, metadata={"format": "pt"})


def whole(folder, config, tokens, seed=0):
    """Hidden states after each layer and logits of the whole model, on the same tokens."""
    ids = torch.randint(96, (2, tokens // 2), generator=torch.Generator().manual_seed(seed))
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, output: states.append(output))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return [*states, logits]


def whole_differences(source, destination, config, tokens, seed=0):
    runs = zip(whole(source, None, tokens, seed), whole(destination, config, tokens, seed), strict=True)
    return [float((dense - mixture).abs().max() / dense.abs().max()) for dense, mixture in runs]


@pytest.mark.parametrize(("family", "target", "changes", "options"), [*((*pair, {}, {}) for pair in ALL), *DEEP])
def test_mixtures_differ_as_they_do_whole(tmp_path, family, target, changes, options):
    source, destination, config = make_pair(tmp_path, family, target, options=options, **changes)
    found = compare_layer_by_layer(source, destination, config, tokens=48, seed=3)
    expected = whole_differences(source, destination, config, 48, seed=3)
    assert [*found.layers, found.logits] == pytest.approx(expected, abs=2e-7)
    assert (found.equal, found.first_wrong_layer, found.tokens) == (True, None, 48)


@pytest.mark.parametrize(("family", "changes"), DENSE_ONLY)
def test_each_model_goes_on_from_its_own_states(tmp_path, family, changes):
    """Two models that have nothing in common but their config differ in every layer as they do whole."""
    changes = {**FOUR, "sliding_window": 5, **changes}
    save_dense(tmp_path / "a", family, **changes)
    save_dense(tmp_path / "b", family, seed=1, **changes)
    config = AutoConfig.from_pretrained(tmp_path / "b")
    found = compare_layer_by_layer(tmp_path / "a", tmp_path / "b", config, tokens=48)
    expected = whole_differences(tmp_path / "a", tmp_path / "b", config, 48)
    assert [*found.layers, found.logits] == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.1
    assert found.first_wrong_layer == 0


def test_sharded_checkpoints(tmp_path):
    source, destination, config = make_pair(tmp_path, options={"max_shard_bytes": 30_000})
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    assert all(len(list(folder.glob("*.safetensors"))) > 2 for folder in (source, destination))
    assert compare_layer_by_layer(source, destination, config, tokens=32).equal


def sizes(folder, *parts):
    return sum(
        math.prod(stored.shape)
        for name, stored in read_headers(folder).items()
        if any(name.startswith(f"model.{part}") or name.startswith(part) for part in parts)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_one_layer_of_one_model_is_in_memory(tmp_path, monkeypatch, tied):
    source, destination, config = make_pair(tmp_path, num_hidden_layers=4, tie_word_embeddings=tied)
    loaded, alive, load = [], [], one_layer._load_layer

    def counted(*args):
        assert not [one for one in alive if one() is not None]
        part = load(*args)
        loaded.append(sum(parameter.numel() for parameter in part.parameters()))
        alive[:] = [weakref.ref(one) for one in (part, *part.parameters())]
        return part

    monkeypatch.setattr(one_layer, "_load_layer", counted)
    gc.disable()  # nothing may wait for it
    try:
        compare_layer_by_layer(source, destination, config, tokens=16)
    finally:
        gc.enable()
    last = "embed_tokens." if tied else "lm_head."
    ends = {0: ("embed_tokens.",), 3: (last,)}
    assert loaded == [
        sizes(folder, f"layers.{layer}.", "norm.", *ends.get(layer, ()))
        for layer in range(4)
        for folder in (source, destination)
    ]


@pytest.mark.parametrize("part", ["self_attn.o_proj", "block_sparse_moe.experts.3.w2"])
def test_the_layer_that_was_spoiled_is_named(tmp_path, part):
    source, destination, config = make_pair(tmp_path, num_hidden_layers=4)
    spoil(destination, f"model.layers.2.{part}.weight", lambda weight: weight * 1.01)
    found = compare_layer_by_layer(source, destination, config, tokens=64)
    assert (found.equal, found.first_wrong_layer) == (False, 2)
    assert max(found.layers[:2]) <= TOLERANCE < min(found.layers[2:])
    assert "layer 2 is the first to differ" in str(found)


def test_a_spoiled_norm_is_no_layers_fault(tmp_path):
    source, destination, config = make_pair(tmp_path)
    spoil(destination, "model.norm.weight", lambda weight: weight + 1)
    found = compare_layer_by_layer(source, destination, config, tokens=16)
    assert (found.equal, found.first_wrong_layer) == (False, None)
    assert "the last norm or the head differs" in str(found)


def test_not_a_number_is_a_difference(tmp_path):
    source, destination, config = make_pair(tmp_path)
    spoil(destination, "model.layers.1.self_attn.o_proj.weight", lambda weight: weight * float("nan"))
    found = compare_layer_by_layer(source, destination, config, tokens=16)
    assert (found.equal, found.first_wrong_layer) == (False, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "target"), [("qwen3", "qwen3_moe"), ("granite", "granitemoe")])
def test_half_precision_is_held_to_twice_the_dense_models_rounding(tmp_path, dtype, family, target):
    source, destination, config = make_pair(tmp_path, family, target, dtype)
    found = compare_layer_by_layer(source, destination, config, tokens=32, dtype=dtype)
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(0))
    half, full = (
        AutoModelForCausalLM.from_pretrained(source, dtype=one)(input_ids=ids).logits.float().detach()
        for one in (dtype, torch.float32)
    )
    rounding = float((half - full).abs().max() / full.abs().max())
    assert found.logits_tolerance == pytest.approx(2 * rounding)
    assert 0 < found.logits <= found.logits_tolerance
    assert found.equal
    assert compare_layer_by_layer(source, destination, config, tokens=32).logits <= TOLERANCE
    spoil(destination, "model.layers.1.self_attn.o_proj.weight", lambda weight: weight * 2)
    found = compare_layer_by_layer(source, destination, config, tokens=32, dtype=dtype)
    assert (found.equal, found.first_wrong_layer) == (False, 1)


def test_text_is_read_with_the_sources_tokenizer(tmp_path):
    source, destination, config = make_pair(tmp_path)
    assert compare_layer_by_layer(source, destination, config, tokens=6, text="w3 w4").tokens == 6  # it has none
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1").save_pretrained(source)
    # Only the third word is another in the mixture.
    spoil(destination, "model.embed_tokens.weight", lambda weight: weight.index_fill(0, torch.tensor([5]), 0.5))
    found = [
        compare_layer_by_layer(source, destination, config, tokens=tokens, text="w3 w4 w5 w6") for tokens in (2, 3, 9)
    ]
    assert [one.tokens for one in found] == [2, 3, 4]
    assert [one.first_wrong_layer for one in found] == [None, 0, 0]
    with pytest.raises(ValueError, match="`text` must hold at least one token"):
        compare_layer_by_layer(source, destination, config, text="")


@pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj.weight", "norm.weight", "embed_tokens.weight"])
@pytest.mark.parametrize(("change", "problem"), [(lambda _: None, "missing"), (lambda one: one[:2], "mismatched")])
def test_weights_that_do_not_load(tmp_path, name, change, problem):
    source, destination, config = make_pair(tmp_path)
    spoil(destination, f"model.{name}", change)
    with pytest.raises(ValueError, match=f"of the mixtral model does not load as it should: .*{problem}_keys"):
        compare_layer_by_layer(source, destination, config, tokens=16)


@pytest.mark.parametrize("name", ["model.layers.1.extra.weight", "model.layers.2.norm.weight", "extra"])
def test_weights_that_are_too_many(tmp_path, name):
    source, destination, config = make_pair(tmp_path)
    path = destination / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected_keys"):
        compare_layer_by_layer(source, destination, config, tokens=16)


def test_a_checkpoint_of_the_bare_model(tmp_path):
    """GPT-2's on the Hub has no "transformer." in its names."""
    folders = [tmp_path / "full", tmp_path / "bare"]
    model = tiny_model("gpt2", "causal_lm")
    model.save_pretrained(folders[0])
    model.transformer.save_pretrained(folders[1])
    assert not set(read_headers(folders[0])) & set(read_headers(folders[1]))
    assert compare_layer_by_layer(*folders, model.config, tokens=16).logits == 0


def test_models_of_other_depth(tmp_path):
    source, destination, config = make_pair(tmp_path)
    save_dense(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="as many layers, got 3 and 2"):
        compare_layer_by_layer(tmp_path / "deeper", destination, config, tokens=16)


def test_the_surroundings_stay_as_they_were(tmp_path, capsys):
    source, destination, config = make_pair(tmp_path)
    before, shown = config.to_dict(), transformers_logging.is_progress_bar_enabled()
    (destination / "config.json").unlink()  # it needs none
    capsys.readouterr()
    compare_layer_by_layer(source, destination, config, tokens=16)
    assert capsys.readouterr().err == ""
    compare_layer_by_layer(source, destination, config, tokens=16, progress=True)
    assert "comparing: 100%" in capsys.readouterr().err
    assert config.to_dict() == before
    assert transformers_logging.is_progress_bar_enabled() == shown


def test_rounding_is_allowed_to_grow_with_depth():
    assert fp32_tolerance(1) == fp32_tolerance(32) == TOLERANCE
    assert fp32_tolerance(128) == 2 * TOLERANCE
