"""A compressed checkpoint read by `from_pretrained` is the dense one, bit for bit."""

import json
import shutil
import sys
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_hf import StructuredTicket, save_compressed, save_dense, slim
from sparse_hf.hub.expand_step import Expand
from sparse_hf.storage.compressed_checkpoint import COMPRESSED_FILE, read_forms
from sparse_hf.storage.tensor_headers import read_header
from tiny_models import HEADS
from tiny_slim import ragged_masks
from tiny_sparse import sparse_model


FAMILIES = [
    ("bert", "sequence_classification", {}),
    ("gpt2", "causal_lm", {}),
    ("t5", "seq2seq_lm", {}),  # tied embeddings, a matrix kept in fp32 under fp16
    ("llama", "causal_lm", {"tie_word_embeddings": True}),
    ("mixtral", "causal_lm", {}),  # experts are merged while they are read
    ("qwen3-moe", "causal_lm", {}),
    ("gpt-oss", "causal_lm", {}),  # experts are stacks on disk
]


def saved(model, place, **options):
    """The folders of the dense and of the compressed checkpoint."""
    model.save_pretrained(place / "dense", **options)
    save_compressed(model, place / "small", **options)
    return place / "dense", place / "small"


def bits(state):
    return {name: (tensor.dtype, tensor.contiguous().view(torch.uint8)) for name, tensor in state.items()}


def same(one, other):
    one, other = bits(one.state_dict()), bits(other.state_dict())
    return one.keys() == other.keys() and all(
        one[name][0] == other[name][0] and one[name][1].equal(other[name][1]) for name in one
    )


@pytest.mark.parametrize(("family", "head", "changes"), FAMILIES, ids=[family for family, _, _ in FAMILIES])
def test_every_family_and_dtype(tmp_path, family, head, changes):
    auto = getattr(transformers, HEADS[head])
    dense, small = saved(sparse_model(family, head, **changes).bfloat16(), tmp_path)
    for options in ({}, {"dtype": torch.float16}, {"dtype": torch.float32, "device_map": "cpu"}):
        expected = auto.from_pretrained(dense, **options)
        found, info = auto.from_pretrained(small, output_loading_info=True, **options)
        assert same(expected, found)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(found) is type(expected)
    # Nothing of ours stays: saved again it is the stock checkpoint.
    found.save_pretrained(tmp_path / "again")
    expected.save_pretrained(tmp_path / "expected")
    again, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "expected"))
    assert again.keys() == wanted.keys()
    assert all(again[name].equal(wanted[name]) for name in wanted)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "expected")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_coded_by_zstd(tmp_path, dtype):
    pytest.importorskip("zstandard")
    model = sparse_model("mixtral", sparsity=0.5, hidden_size=64, intermediate_size=96).to(dtype)
    dense, small = saved(model, tmp_path)
    save_compressed(dense, tmp_path / "smaller", zstd=True)
    forms = {name: form.full_name for name, form in read_forms(tmp_path / "smaller").items()}
    assert {form for name, form in forms.items() if ".experts." in name} == {"bitmask+zstd"}
    expected = AutoModelForCausalLM.from_pretrained(dense)
    assert same(expected, AutoModelForCausalLM.from_pretrained(tmp_path / "smaller"))
    save_dense(tmp_path / "smaller", tmp_path / "back")
    back, wanted = (bits(load_file(folder / "model.safetensors")) for folder in (tmp_path / "back", dense))
    assert back.keys() == wanted.keys()
    assert all(back[name][0] == wanted[name][0] and back[name][1].equal(wanted[name][1]) for name in wanted)
    sizes = [(folder / COMPRESSED_FILE).stat().st_size for folder in (tmp_path / "smaller", small)]
    assert sizes[0] < (0.8 if dtype == torch.bfloat16 else 0.9) * sizes[1]


def test_values_coded_by_zstd_without_the_package(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    save_compressed(sparse_model(), tmp_path / "small", zstd=True)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match="Values coded by zstd need the package `zstandard`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(ImportError, match="not installed"):
        save_compressed(sparse_model(), tmp_path / "other", zstd=True)
    assert not (tmp_path / "other").exists()


def test_shards_and_a_new_head(tmp_path):
    dense, small = saved(sparse_model(), tmp_path, max_shard_size="30KB")
    assert len(list(small.glob("compressed-*.safetensors"))) > 2
    found = []
    for folder in (dense, small):
        torch.manual_seed(0)
        found.append(AutoModelForSequenceClassification.from_pretrained(folder))
    assert same(*found)
    assert same(*(AutoModel.from_pretrained(folder) for folder in (dense, small)))


def test_the_threads_that_read_tensors_expand_them(tmp_path, monkeypatch):
    dense, small = saved(sparse_model(), tmp_path)
    ahead, threads = Expand.ahead, []
    monkeypatch.setattr(
        Expand, "ahead", lambda *arguments: threads.append(threading.current_thread().name) or ahead(*arguments)
    )
    expected = AutoModelForCausalLM.from_pretrained(dense)
    assert same(expected, AutoModelForCausalLM.from_pretrained(small))
    assert len(threads) == len(load_file(small / COMPRESSED_FILE))
    assert any(name.startswith("ThreadPoolExecutor") for name in threads)
    threads.clear()
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    assert same(expected, AutoModelForCausalLM.from_pretrained(small))
    assert threads == []


@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_from_the_hubs_cache(tmp_path, size):
    dense, small = saved(sparse_model(), tmp_path, max_shard_size=size)
    repository = tmp_path / "cache" / "models--me--small"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(small.iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(repository / "blobs" / str(number))
    found = AutoModelForCausalLM.from_pretrained("me/small", cache_dir=tmp_path / "cache")
    assert same(AutoModelForCausalLM.from_pretrained(dense), found)
    save_dense(snapshot, tmp_path / "back")  # links into the repository's blobs are followed
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), found)


def test_a_subfolder(tmp_path):
    dense, _ = saved(sparse_model(), tmp_path / "repo")
    assert same(
        AutoModelForCausalLM.from_pretrained(dense),
        AutoModelForCausalLM.from_pretrained(tmp_path / "repo", subfolder="small"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_dtypes(tmp_path, dtype):
    dense, small = saved(sparse_model(sparsity=0.5).to(dtype), tmp_path)
    if dtype == torch.float64:
        assert same(AutoModelForCausalLM.from_pretrained(dense), AutoModelForCausalLM.from_pretrained(small))
    # Transformers makes no models in fp8 or int8, but reads such checkpoints into others.
    options = {"dtype": torch.float32}
    assert same(
        AutoModelForCausalLM.from_pretrained(dense, **options), AutoModelForCausalLM.from_pretrained(small, **options)
    )


def test_a_slim_model(tmp_path):
    model = sparse_model("bert", "sequence_classification")
    dense, small = saved(slim(model, StructuredTicket(ragged_masks(model))), tmp_path)
    expected, found = (AutoModelForSequenceClassification.from_pretrained(folder) for folder in (dense, small))
    assert type(found).__name__ == "SlimBertForSequenceClassification"
    assert same(expected, found)


def test_it_is_trained_like_any_other(tmp_path):
    _, small = saved(sparse_model(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(small)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not getattr(model, "is_quantized", False)


def test_disk_offload_and_parallelism_are_refused(tmp_path):
    _, small = saved(sparse_model(), tmp_path)
    with pytest.raises(ValueError, match="cannot stay on disk"):
        AutoModelForCausalLM.from_pretrained(small, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    config = transformers.AutoConfig.from_pretrained(small)
    config.distributed_config = object()
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(config.quantization_config)
    model = sparse_model()
    model.config.distributed_config = object()
    with pytest.raises(ValueError, match="cannot be cut for tensor or expert parallelism"):
        quantizer.preprocess_model(model, checkpoint_files=[])


def damaged(small, place, change):
    """A copy in which `change` was done to the bytes of one stored matrix."""
    folder = shutil.copytree(small, place)
    stored = read_header(folder / COMPRESSED_FILE)["model.layers.1.mlp.up_proj.weight"]
    content = bytearray((folder / COMPRESSED_FILE).read_bytes())
    part = memoryview(content)[stored.offset : stored.offset + stored.length]
    change(part)
    part.release()
    (folder / COMPRESSED_FILE).write_bytes(content)
    return folder


def test_hostile_weights_are_one_clear_error(tmp_path):
    _, small = saved(sparse_model(), tmp_path)

    def claim_to_be_huge(part):
        part[56:64] = (1 << 40).to_bytes(8, "little")

    def unset_a_bit(part):
        part[len(part) - 9] ^= 255

    for number, (change, problem) in enumerate(((claim_to_be_huge, "cannot take"), (unset_a_bit, "marks"))):
        folder = damaged(small, tmp_path / str(number), change)
        with pytest.raises(ValueError, match=f"A stored tensor is not usable.*{problem}"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_weights_of_another_shape_are_an_error(tmp_path):
    _, small = saved(sparse_model(), tmp_path)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "intermediate_size": 66}))
    with pytest.raises((RuntimeError, ValueError), match="size|must be"):
        AutoModelForCausalLM.from_pretrained(small)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "../x.safetensors"), ("weights", 3), ("weights", None), ("format", "v2"), ("format", {"a": 1})],
)
def test_a_config_that_lies(tmp_path, name, value):
    _, small = saved(sparse_model(), tmp_path)
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"][name] = value
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"`{name}` of a compressed checkpoint must be"):
        AutoModelForCausalLM.from_pretrained(small)


def test_a_shard_that_is_truncated(tmp_path):
    _, small = saved(sparse_model(), tmp_path)
    content = (small / COMPRESSED_FILE).read_bytes()
    (small / COMPRESSED_FILE).write_bytes(content[:-5])
    with pytest.raises(ValueError, match="truncated, damaged or hostile"):
        AutoModelForCausalLM.from_pretrained(small)


def test_a_tensor_larger_than_the_model_is_never_allocated(tmp_path):
    # All zeros are stored as a bit per 32 elements: 16 MiB of them take 16 KiB.
    weights, config = {"weight": torch.zeros(4096, 1024)}, {"model_type": "llama"}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_compressed(tmp_path, tmp_path / "small")
    stored = load_file(tmp_path / "small" / COMPRESSED_FILE)["weight"]
    step = Expand({"weight": torch.zeros(8, 8)}, {}, 64)
    (found,) = step.convert({"any": [stored]}, ["any"], [r"\1"], full_layer_name="weight")["weight"]
    assert found.numel() == 0
    assert "larger than any" in str(step.error)
