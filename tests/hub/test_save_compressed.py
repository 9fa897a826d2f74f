"""What `save_compressed` writes, what it refuses, and that a Python without sparse_hf cannot load it."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from sparse_hf import save_compressed, save_dense
from sparse_hf.storage import compressed_folder
from sparse_hf.storage.compressed_checkpoint import COMPRESSED_FILE, COMPRESSED_INDEX, read_forms
from sparse_hf.storage.save_lock import only_saver
from tiny_sparse import sparse_model


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "dense"
    sparse_model().save_pretrained(folder)
    (folder / "README.md").write_text("card")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sparse_masks.safetensors").write_bytes(b"masks")
    for left in ("optimizer.pt", "training_args.bin", "trainer_state.json", ".hidden"):
        (folder / left).write_bytes(b"x")
    (folder / "checkpoint-1").mkdir()
    return folder


def test_the_folder(dense, tmp_path):
    assert save_compressed(dense, tmp_path / "small") == tmp_path / "small"
    assert set(contents(tmp_path / "small")) == {
        *("config.json", "generation_config.json", "README.md", "tokenizer.json", "sparse_masks.safetensors"),
        COMPRESSED_FILE,
    }
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    said = {"quant_method": "sparse_hf", "format": "sparse_hf.compressed.v1", "weights": COMPRESSED_FILE}
    assert config.pop("quantization_config") == said
    assert config == json.loads((dense / "config.json").read_text())
    forms = read_forms(tmp_path / "small")
    assert forms["model.layers.0.mlp.up_proj.weight"].form == "bitmask"
    assert forms["model.norm.weight"].form == "dense"
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_a_model_gives_the_same_weights_as_its_folder(dense, tmp_path):
    save_compressed(sparse_model(), tmp_path / "model")
    save_compressed(dense, tmp_path / "folder")
    assert (tmp_path / "model" / COMPRESSED_FILE).read_bytes() == (tmp_path / "folder" / COMPRESSED_FILE).read_bytes()


def test_back_to_a_dense_folder(tmp_path):
    model = sparse_model("mixtral")
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    save_compressed(model, tmp_path / "small", max_shard_size="30KB")
    assert (tmp_path / "small" / COMPRESSED_INDEX).is_file()
    save_dense(tmp_path / "small", tmp_path / "back")
    before, after = contents(tmp_path / "dense"), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    assert json.loads(before["config.json"]) == json.loads(after["config.json"])
    again = type(model).from_pretrained(tmp_path / "back").state_dict()
    assert all(
        tensor.view(torch.int32).equal(again[name].view(torch.int32)) for name, tensor in model.state_dict().items()
    )


def test_an_older_compressed_checkpoint_is_replaced_and_nothing_else(dense, tmp_path):
    save_compressed(sparse_model(sparsity=0.5), tmp_path / "small", max_shard_size="30KB")
    save_compressed(dense, tmp_path / "small")
    assert not (tmp_path / "small" / COMPRESSED_INDEX).exists()
    for stranger in ("checkpoint-1", "model"):
        other = tmp_path / stranger
        other.mkdir()
        (other / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="must be new or hold nothing but an older compressed"):
            save_compressed(dense, other)
        assert contents(other) == {"file": b"mine"}
    (tmp_path / "small" / "checkpoint-1").mkdir()
    with pytest.raises(FileExistsError, match="must be new"):
        save_compressed(dense, tmp_path / "small")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), OSError(errno.EROFS, "x")])
def test_a_save_that_fails_leaves_the_old_checkpoint(dense, tmp_path, monkeypatch, error):
    save_compressed(dense, tmp_path / "small")
    before = contents(tmp_path / "small")

    def failing(source, destination, zstd):
        (destination / "half").write_text("x")
        raise error

    monkeypatch.setattr(compressed_folder, "compress_weights", failing)
    with pytest.raises(type(error), match="Could not save" if isinstance(error, OSError) else None):
        save_compressed(sparse_model(sparsity=0.5), tmp_path / "small")
    assert contents(tmp_path / "small") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_two_saves_at_once_are_refused(dense, tmp_path):
    for save, source in ((save_compressed, dense), (save_dense, dense)):
        with only_saver(tmp_path / "x"), pytest.raises(FileExistsError, match="Another process is saving"):
            save(source, tmp_path / "x")


def test_what_is_refused(dense, tmp_path):
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        save_compressed("nobody/nothing", tmp_path / "small")
    with pytest.raises(ValueError, match="another one than the source"):
        save_compressed(dense, dense)
    save_compressed(dense, tmp_path / "small")
    with pytest.raises(ValueError, match="compressed already"):
        save_compressed(tmp_path / "small", tmp_path / "smaller")
    with pytest.raises(FileNotFoundError, match=r"must hold `compressed.safetensors`"):
        save_dense(dense, tmp_path / "back")
    with pytest.raises(FileExistsError, match="must be a new folder"):
        save_dense(tmp_path / "small", dense)
    assert not (tmp_path / "smaller").exists()
    assert not (tmp_path / "back").exists()


def test_a_link_to_a_private_file_is_not_copied(dense, tmp_path):
    (tmp_path / "secret").write_text("secret")
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        os.link(dense / name, source / name)
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="links to a file outside the checkpoint"):
        save_compressed(source, tmp_path / "small")
    assert not (tmp_path / "small").exists()


READER = """
import sys
sys.modules["sparse_hf"] = None  # from here on `import sparse_hf` fails
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for auto, options in ((AutoModel, {}), (AutoModelForCausalLM, {}), (AutoModel, {"use_safetensors": True})):
        try:
            auto.from_pretrained(folder, **options)
            print("LOADED")
        except (OSError, RuntimeError) as error:
            print(type(error).__name__, str(error).splitlines()[0])
"""


def test_without_sparse_hf_nothing_loads(dense, tmp_path):
    save_compressed(dense, tmp_path / "small")
    save_compressed(sparse_model(), tmp_path / "sharded", max_shard_size="30KB")
    save_compressed(dense, tmp_path / "renamed")  # by somebody who means well
    (tmp_path / "renamed" / COMPRESSED_FILE).rename(tmp_path / "renamed" / "model.safetensors")
    command = [sys.executable, "-c", READER, *(str(tmp_path / name) for name in ("small", "sharded", "renamed"))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(line.startswith("OSError Error no file named model.safetensors") for line in lines[:6])
    assert all(line.startswith("RuntimeError You set `ignore_mismatched_sizes` to `False`") for line in lines[6:])
    assert len(lines) == 9
