"""Which router rows tell domains apart from the start? Fitted in closed form to samples of text."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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

    def __init__(self, hidden: int) -> None:
        self.count = 0
        self.sum = torch.zeros(hidden, dtype=torch.float64)
        self.products = torch.zeros(hidden, hidden, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Rows of inputs, (tokens, hidden)."""
        x = x.double().cpu()
        self.count += len(x)
        self.sum += x.sum(0)
        self.products += x.T @ x


@torch.no_grad()
def fit_routers(
    source: str | Path,
    samples: Mapping[str, Sequence[str]],
    *,
    max_length: int = 256,
    batch_size: int = 8,
    strength: float = 0.01,
) -> FittedRouters:
    """Ridge regression of the domain on what each FFN gets to see, which is what a router will see.

    W = (XᵀX / n + strength * var(X) I)^-1 Xᵀ(Y - 1/D) / n, where Y says the domain (one-hot) and every domain counts
    equally however long it is. Rows are scaled so that logits vary by 1 over the samples. Another known start, the
    mean input of each domain, told domains apart worse in a small comparison of ours. Holds the dense model.

    Args:
        source: folder or Hub id of the dense checkpoint, with its tokenizer.
        samples: texts by domain, two domains or more; the last quarter of each is held out for `accuracy`, and used
            for the fit as well if there are fewer than four.
        max_length: tokens of a text that are read.
        batch_size: texts at once.
        strength: of the ridge, relative to the inputs' mean variance.

    Raises:
        ValueError: fewer than two domains, one without texts, or a model whose FFNs are not found.
    """
    if len(samples) < 2 or not all(samples.values()):
        raise ValueError(f"Routers are fitted to the texts of 2 or more domains, got {[*map(len, samples.values())]}.")
    folder = local_folder(source, ["config.json", *WEIGHTS, *COMPANIONS])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ffns = _ffns(model)
    held_out = {domain: list(texts)[-max(1, len(texts) // 4) :] for domain, texts in samples.items()}
    fitted = {
        domain: list(texts)[: -(len(texts) // 4)] if len(texts) >= 4 else list(texts)
        for domain, texts in samples.items()
    }

    def passes(texts: list[str], visit: Callable[[int, Tensor], None]) -> None:
        for start in range(0, len(texts), batch_size):
            options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
            batch = tokenizer(texts[start : start + batch_size], **options)
            kept = batch["attention_mask"].bool()
            with _inputs_seen(ffns, lambda layer, x, kept=kept: visit(layer, x[kept])):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    moments = {layer: [_Moments(model.config.hidden_size) for _ in samples] for layer in ffns}
    for number, texts in enumerate(fitted.values()):
        passes(texts, lambda layer, x, number=number: moments[layer][number].add(x))
    rows = {layer: _ridge(found, strength) for layer, found in moments.items()}
    right, total = dict.fromkeys(ffns, 0), dict.fromkeys(ffns, 0)

    def judge(layer: int, x: Tensor, number: int) -> None:
        right[layer] += int((x.double().cpu() @ rows[layer].T).argmax(1).eq(number).sum())
        total[layer] += len(x)

    for number, texts in enumerate(held_out.values()):
        passes(texts, lambda layer, x, number=number: judge(layer, x, number))
    return FittedRouters(
        tuple(samples),
        {layer: one.float().numpy() for layer, one in rows.items()},
        {layer: right[layer] / total[layer] for layer in ffns},
    )


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


def _ffns(model: nn.Module) -> dict[int, nn.Module]:
    layers = model.base_model.layers
    found = {
        number: getattr(layer, name)
        for number, layer in enumerate(layers)
        for name in FFN_NAMES
        if hasattr(layer, name)
    }
    if len(found) < len(layers):
        raise ValueError(
            f"The FFN of every layer must be called one of {', '.join(FFN_NAMES)}, got {type(model).__name__}: give "
            "`router_rows` from elsewhere."
        )
    return found


@contextlib.contextmanager
def _inputs_seen(ffns: Mapping[int, nn.Module], visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, inputs)` in every forward pass of an FFN."""
    handles = [
        ffn.register_forward_pre_hook(lambda _, inputs, layer=layer: visit(layer, inputs[0]))
        for layer, ffn in ffns.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
