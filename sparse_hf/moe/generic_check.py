"""Does a generic mixture of experts compute what the dense model computes?"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sparse_hf.moe.generic_plan import dense_class
from sparse_hf.moe.modeling_mixture import base_of, mixture_model_class


FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@torch.no_grad()
def largest_generic_difference(
    source: Path, destination: Path, config: PreTrainedConfig, tokens: int, seed: int
) -> float:
    """The largest difference of logits, or without a head for tokens of hidden states, by the largest of them.

    Both models are computed in fp32 from the weights as stored, one after the other, on one seeded random sequence of
    at most `tokens` tokens and half of the positions that the model has; a ViT on random pixels of one image. Needs
    the memory of the larger model in fp32.

    Args:
        source: folder of the dense checkpoint, with its config.
        destination: folder with the mixture's weights; it needs no config.
        config: of the mixture.

    Raises:
        ValueError: the mixture does not load, or has missing or unexpected weights that the dense model has not.
    """
    stock = dense_class(AutoConfig.from_pretrained(source))
    dense, before = stock.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    with tempfile.TemporaryDirectory() as place:
        # The destination has no config yet, so that nobody loads it unchecked.
        for path in (*destination.glob("*.safetensors"), *destination.glob("*.index.json")):
            (Path(place) / path.name).symlink_to(path.resolve())
        config.save_pretrained(place)
        mixture, after = mixture_model_class(stock).from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
    wrong = {name: sorted(found) for name in FAULTS if (found := set(after[name]) - set(before[name]))}
    if wrong:
        raise ValueError(f"The mixture of experts does not load as it should: {wrong!r:.300}.")
    inputs = _inputs(dense, tokens, torch.Generator().manual_seed(seed))
    expected, found = (_output(model, inputs) for model in (dense, mixture))
    return float((expected - found).abs().max() / expected.abs().max())


def _inputs(model: PreTrainedModel, tokens: int, generator: torch.Generator) -> Tensor:
    config = model.config
    if model.main_input_name == "pixel_values":
        return torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=generator)
    positions = getattr(config, "max_position_embeddings", None) or 2 * tokens
    return torch.randint(config.vocab_size, (1, max(1, min(tokens, positions // 2))), generator=generator)


def _output(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Of heads that need more than a sequence (multiple choice), or pool it, the hidden states are compared."""
    runner = base_of(model)[1] if model.get_output_embeddings() is None else model
    return runner.eval()(inputs)[0]
