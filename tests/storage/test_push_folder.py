"""Which weights of an earlier push must go?"""

import pytest

from sparse_hf.storage.push_folder import outdated_weights


STOCK = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
VARIANTS = ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
PICKLES = ["pytorch_model.bin", "pytorch_model-00001-of-00003.bin", "pytorch_model.bin.index.json"]
COMPRESSED = ["compressed.safetensors", "compressed-00001-of-00002.safetensors", "compressed.safetensors.index.json"]
OTHERS = ["config.json", "README.md", "sparse_masks.safetensors", "adapter_model.safetensors", "modeling_slim.py"]
OTHERS += ["model_card.md", "models.safetensors", "last-checkpoint/model.safetensors", "model.d/model.safetensors"]
OTHERS += ["compressed.txt", "uncompressed.safetensors", "optimizer.bin", "training_args.bin"]
EVERYTHING = [*STOCK, *VARIANTS, *PICKLES, *COMPRESSED, *OTHERS]


@pytest.mark.parametrize(
    ("pushed", "gone"),
    [
        pytest.param(COMPRESSED[:1], [*STOCK, *VARIANTS, *PICKLES, *COMPRESSED[1:]], id="compressed"),
        pytest.param(COMPRESSED[1:], [*STOCK, *VARIANTS, *PICKLES, *COMPRESSED[:1]], id="compressed-shards"),
        pytest.param(STOCK[:1], [*STOCK[1:], *COMPRESSED], id="dense"),
        pytest.param(STOCK[1:], [*STOCK[:1], *COMPRESSED], id="dense-shards"),
        pytest.param(OTHERS, [], id="no-weights"),
    ],
)
def test_what_goes(pushed, gone):
    assert outdated_weights(["config.json", *pushed], EVERYTHING) == sorted(gone)
    assert outdated_weights(["config.json", *pushed], [*OTHERS, *pushed]) == []
