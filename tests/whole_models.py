"""What the check by layer should find, found the plain way: both models whole."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig


@torch.no_grad()
def largest_difference(source: Path, destination: Path, config: PreTrainedConfig, tokens: int, seed: int) -> float:
    """The largest difference of logits, as a fraction of the largest logit, on seeded random tokens.

    Both are computed in fp32 from the weights as stored, one model after the other, so that rounding of another dtype
    does not hide what the conversion did. Needs the memory of the larger model in fp32.

    Raises:
        ValueError: the mixture does not load without missing or unexpected weights.
    """
    vocabulary = AutoConfig.from_pretrained(source).vocab_size
    ids = torch.randint(vocabulary, (2, max(1, tokens // 2)), generator=torch.Generator().manual_seed(seed))
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as place:
        # The destination has no config yet, so that nobody loads it unchecked.
        for path in (*destination.glob("*.safetensors"), *destination.glob("*.index.json")):
            (Path(place) / path.name).symlink_to(path.resolve())
        config.save_pretrained(place)
        model, info = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    wrong = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(f"The mixture of experts does not load as it should: {wrong!r:.300}.")
    mixture = model.eval()(input_ids=ids).logits
    return float((dense - mixture).abs().max() / dense.abs().max())
