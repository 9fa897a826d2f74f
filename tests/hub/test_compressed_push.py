"""A compressed checkpoint goes to the Hub and comes back, and no weights of another push stay beside it."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM

from hub.hub_server import hub as hub  # a fixture
from sparse_hf import publish, save_compressed
from sparse_hf.cards import card
from sparse_hf.storage import compressed_folder
from tiny_sparse import sparse_model


PICKLE = "training_args.bin"  # as a Trainer leaves it, and not copied to a compressed checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "dense"
    sparse_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / PICKLE).write_bytes(b"pickle")
    return folder


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Drawing takes most of the time of a push, and these tests are not about it."""
    monkeypatch.setattr(card, "draw_layers", lambda *_: None)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(hub, name):
    return sorted(path for path in hub.files(name) if path.endswith((".safetensors", ".bin", ".index.json")))


def pulls_as(name, folder):
    """Whether the repository loads as the folder does, bit for bit."""
    pulled, expected = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (name, folder))
    return pulled.keys() == expected.keys() and all(
        tensor.view(torch.int32).equal(pulled[key].view(torch.int32)) for key, tensor in expected.items()
    )


def test_with_coded_values(hub, dense):
    pytest.importorskip("zstandard")
    publish(dense, "me/model", compressed="zstd")
    assert weights(hub, "me/model") == ["compressed.safetensors"]
    assert b"bitmask+zstd" in hub.files("me/model")["compressed.safetensors"]
    assert pulls_as("me/model", dense)


def test_compressed_over_dense(hub, dense, tmp_path):
    sparse_model(sparsity=0.5).save_pretrained(tmp_path / "older", max_shard_size="30KB")
    (tmp_path / "older" / "pytorch_model.bin").write_bytes(b"still older")
    publish(tmp_path / "older", "me/model")
    assert len(weights(hub, "me/model")) > 3
    before = contents(dense)
    publish(dense, "me/model", compressed=True)
    assert contents(dense) == before
    assert weights(hub, "me/model") == ["compressed.safetensors"]
    assert {"config.json", "tokenizer.json", "README.md"} <= hub.files("me/model").keys()
    assert len(hub.repositories.named["me/model"].commits) == 3  # the first is empty
    assert pulls_as("me/model", dense)
    text = hub.text("me/model", "README.md")
    assert (
        "import sparse_hf\nfrom transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_" in text
    )
    assert "Without `import sparse_hf` it does not load." in text
    assert 'from_pretrained("me/model")' in text


def test_dense_over_compressed(hub, dense, tmp_path):
    save_compressed(sparse_model(sparsity=0.5), tmp_path / "small", max_shard_size="30KB")
    publish(tmp_path / "small", "me/model", compressed=True)  # which it is already
    assert len(weights(hub, "me/model")) > 3
    publish(dense, "me/model")
    assert weights(hub, "me/model") == ["model.safetensors", PICKLE]
    assert "quantization_config" not in json.loads(hub.text("me/model", "config.json"))
    assert "import sparse_hf\n" not in hub.text("me/model", "README.md")
    assert pulls_as("me/model", dense)


def test_other_folders_of_the_repository_stay(hub, dense):
    publish(dense, "me/model")
    for place in ("last-checkpoint", "model.d"):
        HfApi().upload_folder(repo_id="me/model", folder_path=dense, path_in_repo=place)
    publish(dense, "me/model", compressed=True)
    kept = [f"{place}/{name}" for place in ("last-checkpoint", "model.d") for name in ("model.safetensors", PICKLE)]
    assert weights(hub, "me/model") == ["compressed.safetensors", *kept, PICKLE]


@pytest.mark.parametrize(
    ("fault", "after"),
    [("POST .*/commit/", 2000), ("PUT /objects/", 700), ("POST .*/objects/batch", 0), ("GET .*/tree/", 10)],
)
def test_cut_off_in_the_middle_the_old_commit_is_whole(hub, dense, fault, after):
    publish(dense, "me/model")
    old = hub.files("me/model")
    hub.fail(fault, times=20, after=after)
    with pytest.raises(Exception, match="(?i)disconnect|connection|closed|uploading"):
        publish(dense, "me/model", compressed=True)
    assert hub.files("me/model") == old
    hub.faults.clear()
    assert pulls_as("me/model", dense)
    publish(dense, "me/model", compressed=True)
    assert weights(hub, "me/model") == ["compressed.safetensors", PICKLE]


def test_somebody_elses_commit_in_between_is_not_lost(hub, dense, monkeypatch):
    publish(dense, "me/model")
    honest = HfApi.create_commit

    def late(self, repo_id, operations, **options):
        monkeypatch.setattr(HfApi, "create_commit", honest)
        self.upload_file(path_or_fileobj=b"new weights", path_in_repo="model.safetensors", repo_id=repo_id)
        return honest(self, repo_id, operations, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(HfHubHTTPError, match="412"):
        publish(dense, "me/model", compressed=True)
    assert hub.files("me/model")["model.safetensors"] == b"new weights"


def test_private_and_without_leave(hub, dense):
    publish(dense, "me/secret", private=True, compressed=True)
    for token in (False, "hf_you"):
        with pytest.raises(OSError, match="is not a local folder|gated|not a valid model|401|404"):
            AutoModelForCausalLM.from_pretrained("me/secret", token=token)
    assert pulls_as("me/secret", dense)
    for token, status in (("hf_you", "403"), (False, "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            publish(dense, "me/secret", token=token, compressed=True)
    assert len(hub.repositories.named["me/secret"].commits) == 2


def test_what_cannot_be_compressed_reaches_no_hub(hub, dense, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(FileNotFoundError, match="Tickets and adapters are not compressed"):
        publish(tmp_path / "adapter", "me/model", compressed=True)

    def full(source, destination, zstd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed_folder, "compress_weights", full)
    with pytest.raises(OSError, match="the disk is full"):
        publish(dense, "me/model", compressed=True)
    assert hub.requests == []
