"""Which router rows tell domains apart from the start? Fitted in closed form to samples of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from sparse_hf.moe.one_layer import LoadedLayer, layered_checkpoint
from sparse_hf.moe.plan_upcycling import COMPANIONS, WEIGHTS
from sparse_hf.storage.locations import local_folder


FFN_NAMES = ("mlp", "feed_forward")  # of a decoder layer's FFN, by family


@dataclass(frozen=True)
class FittedRouters:
    """Rows for routers and what they are worth.

    Attributes:
        domains: in the order of the rows.
        rows: per layer, float32 (domains, hidden); `upcycle(..., router_rows=...)` takes them.
        accuracy: per layer, the share of held-out tokens whose highest logit is their own domain's; with D equally
            long domains 1 / D is chance.
    """

    domains: tuple[str, ...]
    rows: dict[int, np.ndarray]
    accuracy: dict[int, float]


class _Moments:
    """Sums of x and x xᵀ over the tokens of one domain, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Rows of inputs, (tokens, hidden)."""
        x = x.double()
        self.count += len(x)
        self.sum = self.sum + x.sum(0)
        self.products = torch.addmm(self.products, x.T, x) if self.products.ndim else x.T @ x


@dataclass
class _Batch:
    """Texts of one domain on their way through the layers."""

    domain: int
    fitted: bool = field(metadata={"help": "Whether the fit may see it."})
    held_out: bool = field(metadata={"help": "Whether it is judged by it."})
    inputs: dict[str, Tensor]
    states: Tensor | None = None


@torch.no_grad()
def fit_routers(
    source: str | Path,
    samples: Mapping[str, Sequence[str]],
    *,
    max_length: int = 256,
    batch_size: int = 8,
    strength: float = 0.01,
    progress: bool = False,
) -> FittedRouters:
    """Ridge regression of the domain on what each FFN gets to see, which is what a router will see.

    W = (XᵀX / n + strength * var(X) I)^-1 Xᵀ(Y - 1/D) / n, where Y says the domain (one-hot) and every domain counts
    equally however long it is. Rows are scaled so that logits vary by 1 over the samples. Another known start, the
    mean input of each domain, told domains apart worse in a small comparison of ours.

    All samples go through one layer after the other, in float32 on the CPU. In memory are one layer (with the
    embeddings at the first), the samples' hidden states, 4 x tokens x hidden bytes, and for each domain a float64
    matrix of hidden x hidden.

    Args:
        source: folder or Hub id of the dense checkpoint, with its tokenizer.
        samples: texts by domain, two domains or more; the last quarter of each is held out for `accuracy`, and used
            for the fit as well if there are fewer than four.
        max_length: tokens of a text that are read.
        batch_size: texts at once.
        strength: of the ridge, relative to the inputs' mean variance.
        progress: show a bar over the layers.

    Raises:
        ValueError: fewer than two domains, one without texts, a model whose FFNs are not found, or weights that do
            not belong to its config.
    """
    if len(samples) < 2 or not all(samples.values()):
        raise ValueError(f"Routers are fitted to the texts of 2 or more domains, got {[*map(len, samples.values())]}.")
    folder = local_folder(source, ["config.json", *WEIGHTS, *COMPANIONS])
    model = layered_checkpoint(folder, AutoConfig.from_pretrained(folder))
    batches = _batches(AutoTokenizer.from_pretrained(folder), samples, max_length, batch_size)
    rows, accuracy = {}, {}
    for number in tqdm(range(model.count), "fitting routers", unit="layer", disable=not progress):
        layer = LoadedLayer(model, number, torch.float32)
        moments, judged = [_Moments() for _ in samples], []
        for batch in batches:
            seen = _run(layer, batch)
            if batch.fitted:
                moments[batch.domain].add(seen)
            if batch.held_out:
                judged.append((batch.domain, seen))
        del layer  # before the next one is there
        fitted = _ridge(moments, strength)
        rows[number], accuracy[number] = fitted.float().numpy(), _accuracy(fitted, judged)
    return FittedRouters(tuple(samples), rows, accuracy)


def _batches(
    tokenizer: PreTrainedTokenizerBase, samples: Mapping[str, Sequence[str]], max_length: int, batch_size: int
) -> list[_Batch]:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
    found = []
    for domain, texts in enumerate(samples.values()):
        texts, few = list(texts), len(texts) < 4
        first = len(texts) - max(1, len(texts) // 4)  # of the held-out ones
        for part, held_out in ((texts[:first], False), (texts[first:], True)):
            for start in range(0, len(part), batch_size):
                batch = tokenizer(part[start : start + batch_size], **options)
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                found.append(_Batch(domain, fitted=few or not held_out, held_out=held_out, inputs=inputs))
    return found


def _run(layer: LoadedLayer, batch: _Batch) -> Tensor:
    """Run the layer on a batch's states; returns what its FFN got, without padding, (tokens, hidden)."""
    seen: list[Tensor] = []
    hook = _ffn(layer.module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        batch.states, _ = layer.run(batch.states, **batch.inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0][batch.inputs["attention_mask"].bool()]


def _accuracy(rows: Tensor, judged: Iterable[tuple[int, Tensor]]) -> float:
    right = total = 0
    for domain, seen in judged:
        right += int((seen.double() @ rows.T).argmax(1).eq(domain).sum())
        total += len(seen)
    return right / total


def _ridge(moments: list[_Moments], strength: float) -> Tensor:
    """float64 (domains, hidden)."""
    domains, hidden = len(moments), len(moments[0].sum)
    means = torch.stack([one.sum / one.count for one in moments])
    products = torch.stack([one.products / one.count for one in moments]).mean(0)
    variance = (products.diagonal() - means.mean(0).square()).mean()
    wanted = torch.eye(domains, dtype=torch.float64) - 1 / domains  # of a domain's tokens, by row
    right = means.T @ wanted / domains
    rows = torch.linalg.solve(products + strength * variance * torch.eye(hidden, dtype=torch.float64), right).T
    centred = products - torch.outer(means.mean(0), means.mean(0))
    spread = ((rows @ centred) * rows).sum(1).mean().sqrt()
    return rows / spread


def _ffn(layer: nn.Module) -> nn.Module:
    found = [getattr(layer, name) for name in FFN_NAMES if hasattr(layer, name)]
    if not found:
        raise ValueError(
            f"The FFN of every layer must be called one of {', '.join(FFN_NAMES)}, got {type(layer).__name__}: give "
            "`router_rows` from elsewhere."
        )
    return found[0]
