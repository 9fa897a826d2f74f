"""Does the mixture of experts compute what the dense model computes, and if not, from which layer on?"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from sparse_hf.moe.one_layer import layered_checkpoint, run_layers


TOLERANCE = 1e-5  # of the dense model's largest value, in fp32 and for up to LAYERS layers
LAYERS = 32  # Roundings add up at random: tolerance grows with the square root of the layers beyond.
ROUNDINGS = 2  # In another dtype: so many times what the dense model itself differs by between it and fp32.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class LayerwiseComparison:
    """The largest differences between two models, as fractions of the dense model's largest value at that place."""

    tokens: int
    dtype: torch.dtype = field(metadata={"help": "The models were computed in."})
    layers: tuple[float, ...] = field(metadata={"help": "Of the hidden states that each layer returns."})
    logits: float
    layer_tolerances: tuple[float, ...]
    logits_tolerance: float

    @property
    def equal(self) -> bool:
        """Whether the logits are within their tolerance; hidden states only tell where a difference begins."""
        return self.logits <= self.logits_tolerance

    @property
    def first_wrong_layer(self) -> int | None:
        """The first layer whose hidden states are not within their tolerance; None if there is none."""
        pairs = zip(self.layers, self.layer_tolerances, strict=True)
        return next((layer for layer, (got, allowed) in enumerate(pairs) if not got <= allowed), None)

    def __str__(self) -> str:
        wrong = self.first_wrong_layer
        verdict = "equal" if self.equal else "different"
        if wrong is not None:
            verdict += f", layer {wrong} is the first to differ"
        elif not self.equal:
            verdict += " though no layer is: the last norm or the head differs"
        rows = [
            f"{place:<10} {got:.1e} (at most {allowed:.1e})"
            for place, got, allowed in zip(
                [*(f"layer {layer}" for layer in range(len(self.layers))), "logits"],
                [*self.layers, self.logits],
                [*self.layer_tolerances, self.logits_tolerance],
                strict=True,
            )
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        head = f"{self.tokens} tokens in {dtype}: {verdict}. Largest difference, relative to the largest value:"
        return "\n".join([head, *rows])


@torch.no_grad()
def compare_layer_by_layer(
    source: Path,
    destination: Path,
    config: PreTrainedConfig,
    *,
    tokens: int = 256,
    seed: int = 0,
    text: str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> LayerwiseComparison:
    """Run the dense model and its mixture side by side, each on its own hidden states, in the memory of one layer.

    At any time at most one decoder layer of one model is loaded, with the embeddings at the first one and the head at
    the last (tied: the embeddings again). On the CPU.

    Args:
        source: folder of the dense checkpoint, with its config.
        destination: folder with the mixture's weights; it needs no config.
        config: of the mixture.
        tokens: how many are compared at most: the beginning of `text`, or two sequences of random ids.
        seed: of the random ids.
        text: read with the source's tokenizer; if its folder has none, ids are random all the same.
        dtype: to compute in. Weights are converted to it from how they are stored, so that in fp32 no rounding hides
            what the conversion did: see `fp32_tolerance`. In another dtype it is twice what the
            dense model itself differs by between that dtype and fp32, which is measured by running it in both.
        progress: show a bar.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: a checkpoint does not load without missing, unexpected or mismatched weights; the models differ in
            their number of layers; `text` holds no token. Never for a difference, which is the caller's to judge.
        RuntimeError: Transformers cannot convert the weights, as one expert of several is missing.
    """
    dense = layered_checkpoint(source, AutoConfig.from_pretrained(source))
    mixture = layered_checkpoint(destination, config)
    if dense.count != mixture.count:
        raise ValueError(f"Both models must have as many layers, got {dense.count} and {mixture.count}.")
    ids = _token_ids(source, dense.config.get_text_config().vocab_size, tokens, seed, text)
    runs = [run_layers(dense, ids, dtype), run_layers(mixture, ids, dtype)]
    if dtype != torch.float32:
        runs.append(run_layers(dense, ids, torch.float32))
    differences, tolerances = [], []
    steps = tqdm(zip(*runs, strict=True), "comparing", dense.count + 1, unit="layer", disable=not progress)
    for expected, got, *exact in steps:
        differences.append(_difference(expected, got))
        tolerances.append(ROUNDINGS * _difference(exact[0], expected) if exact else fp32_tolerance(dense.count))
    return LayerwiseComparison(
        tokens=ids.numel(),
        dtype=dtype,
        layers=tuple(differences[:-1]),
        logits=differences[-1],
        layer_tolerances=tuple(tolerances[:-1]),
        logits_tolerance=tolerances[-1],
    )


def fp32_tolerance(layers: int) -> float:
    """How far roundings may drive two equal models of so many layers apart, as a fraction of the largest value."""
    return TOLERANCE * math.sqrt(max(1.0, layers / LAYERS))


def _token_ids(source: Path, vocabulary: int, tokens: int, seed: int, text: str | None) -> Tensor:
    """[1, length] of the text, or [2, length] at random."""
    if text is None or not any((source / name).is_file() for name in TOKENIZER_FILES):
        return torch.randint(vocabulary, (2, max(1, tokens // 2)), generator=torch.Generator().manual_seed(seed))
    ids = AutoTokenizer.from_pretrained(source)(text)["input_ids"][: max(1, tokens)]
    if not ids:
        raise ValueError("`text` must hold at least one token of the source's tokenizer, got none.")
    return torch.tensor([ids])


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest, as a fraction of the largest expected value; NaN if either has one."""
    return float((expected.float() - got.float()).abs().max() / expected.float().abs().max())
