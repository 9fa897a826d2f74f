"""What is sparse in a folder, read off its files and compared with what is known of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cards.folders import (
    save_mixture,
    save_slim_model,
    save_sparse_model,
    save_structured_ticket,
    save_ticket,
    save_zeros,
)
from dsee.tiny_dsee import dsee_model
from hub.hub_server import hub as hub  # a fixture
from sparse_hf import dsee_sparsity, inspect, publish
from sparse_hf.cards import card, zero_counts
from sparse_hf.cards.layers import MatrixZeros, by_layer, place
from sparse_hf.cards.zero_counts import count_ones, count_zeros, has_countable_zeros
from sparse_hf.hub.save_compressed import save_compressed
from sparse_hf.storage.tensor_headers import read_header


@pytest.mark.parametrize(
    ("save", "kind", "counted"),
    [
        (save_sparse_model, "sparse_model", "masks"),
        (save_zeros, "sparse_model", "weights"),
        (save_ticket, "ticket", "masks"),
        (save_structured_ticket, "structured_ticket", None),
        (save_slim_model, "slim_model", "weights"),
        (save_mixture, "mixture", "weights"),
    ],
)
def test_every_kind_of_folder_is_known(tmp_path, save, kind, counted):
    found = inspect(save(tmp_path / "it"))
    assert (found.kind, found.counted) == (kind, counted)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "it").iterdir()
    )


def test_masks_by_hand(tmp_path):
    found = inspect(save_sparse_model(tmp_path / "sparse"))
    # 2 layers of 4 matrices of 32 x 32 and 2 of 64 x 32, and the pooler; half of each is zero
    assert (found.weights, found.zeros) == (17408, 8704)
    assert {one.sparsity for one in found.matrices} == {0.5}
    assert found.model_sparsity == 8704 / 22723
    assert (found.method, found.model_type) == ("one_shot", "bert")
    layers = by_layer(found.matrices)
    assert [(one.name, one.weights) for one in layers] == [
        ("encoder.layer 0", 8192),
        ("encoder.layer 1", 8192),
        ("outside the layers", 1024),
    ]


def test_zeros_of_weights_are_those_of_the_masks(tmp_path):
    by_masks, by_weights = inspect(save_sparse_model(tmp_path / "a")), inspect(save_zeros(tmp_path / "b"))
    counted = {one.name.removeprefix("bert."): one.zeros for one in by_weights.matrices}
    assert {one.name: counted[one.name] for one in by_masks.matrices} == {
        one.name: one.zeros for one in by_masks.matrices
    }
    assert inspect(tmp_path / "b", count_zeros=False).matrices == ()


def test_units(tmp_path):
    found = inspect(save_structured_ticket(tmp_path / "ticket"))
    assert [(one.layer, one.kind, one.kept, one.units) for one in found.units[:2]] == [
        ("encoder.layer.0", "heads", 2, 4),
        ("encoder.layer.0", "neurons", 48, 64),
    ]
    assert found.units_kept("neurons") == (96, 128)
    cut = inspect(save_slim_model(tmp_path / "slim"))
    assert cut.units_kept("neurons") == (96, None)
    assert not cut.stock


def test_experts(tmp_path):
    mixture = inspect(save_mixture(tmp_path / "mixture")).mixture
    assert (mixture.experts, mixture.top_k, mixture.layers) == (4, 2, 2)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_dsee_adapter(tmp_path, family):
    adapted = dsee_model(family, masked_modules=["intermediate.dense", "c_fc"])
    adapted.save_pretrained(tmp_path / "adapter")
    found = inspect(tmp_path / "adapter")
    assert found.kind == "dsee_adapter"
    assert (found.adapter.rank, found.adapter.nnz) == (2, 20)
    assert found.adapter.trained == sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    assert found.sparsity == pytest.approx(dsee_sparsity(adapted).base, abs=1e-12)


def test_a_compressed_checkpoint_tells_its_zeros_by_its_heads(tmp_path):
    save_compressed(save_zeros(tmp_path / "zeros"), tmp_path / "small")
    found, dense = inspect(tmp_path / "small"), inspect(tmp_path / "zeros")
    assert (found.kind, found.counted) == ("compressed_model", "heads")
    zeros = {one.name: one.zeros for one in dense.matrices}
    assert sum(one.zeros for one in found.matrices) > 8000
    assert {one.name: one.zeros for one in found.matrices} == {one.name: zeros[one.name] for one in found.matrices}
    assert found.parameters == dense.parameters
    assert found.compression["bytes"] < found.compression["dense_bytes"] == 4 * dense.parameters


def test_no_weight_of_a_repository_is_fetched_unasked(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "draw_layers", lambda *_: None)
    publish(save_sparse_model(tmp_path / "sparse"), "me/sparse")
    publish(save_zeros(tmp_path / "zeros"), "me/zeros")
    local = inspect(tmp_path / "sparse")
    hub.requests.clear()
    remote = inspect("me/sparse")
    assert remote.matrices == local.matrices
    assert remote.parameters == local.parameters
    assert remote.files.items() >= local.files.items()  # sizes of what was not fetched, too
    plain = inspect("me/zeros")
    assert (plain.kind, plain.matrices) == ("model", ())
    assert not [line for line in hub.requests if "model.safetensors" in line]
    assert inspect("me/zeros", count_zeros=True).kind == "sparse_model"
    assert [line for line in hub.requests if "model.safetensors" in line]


def test_no_model_is_made(tmp_path, monkeypatch):
    save_zeros(tmp_path / "zeros")
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a module was made"))
    assert inspect(tmp_path / "zeros").zeros > 8000


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64]
)
def test_zeros_of_every_dtype_across_blocks(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(zero_counts, "BLOCK", 16)
    values = torch.arange(-9, 10).to(dtype).repeat(7, 1) * (torch.arange(19) % 3 > 0)
    save_file({"before": torch.zeros(3), "w": values}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    assert count_zeros(stored["w"]) == int((values == 0).sum())
    assert not has_countable_zeros(stored["before"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_both_zeros_count_and_the_smallest_number_does_not(tmp_path, dtype):
    values = torch.tensor([[0, 128, 1, 129, 127]], dtype=torch.uint8).view(dtype)
    save_file({"w": values}, tmp_path / "x.safetensors")
    assert count_zeros(read_header(tmp_path / "x.safetensors")["w"]) == 2


def test_bits_by_hand():
    assert count_ones(torch.tensor([0, 1, 255, 0b1010], dtype=torch.uint8).numpy()) == 11


def test_places_and_order():
    assert place("model.layers.3.mlp.experts.7.w1.weight") == ("model.layers", 3, "mlp.experts.7.w1")
    assert place("lm_head.weight") == ("", -1, "lm_head")
    names = ["pooler.weight", "decoder.1.q", "encoder.10.q", "encoder.2.q"]
    assert [one.name for one in by_layer(MatrixZeros(name, 4, 1) for name in names)] == [
        *("decoder 1", "encoder 2", "encoder 10", "outside the layers"),
    ]


def test_nothing_known_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a model in safetensors, a ticket or an adapter"):
        inspect(tmp_path)
