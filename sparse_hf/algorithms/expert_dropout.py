"""Which experts may be chosen in this step, if each is left out with some probability?"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def kept_experts(layers: int, experts: int, top_k: int, probability: float, generator: torch.Generator) -> Tensor:
    """Each expert of each layer stays with `1 - probability`, but at least `top_k` per layer, bool (layers, experts).

    Where too few would stay, those come back whose draws were the nearest to staying.

    Args:
        generator: on the CPU; the same state gives the same experts everywhere.
    """
    draws = torch.rand(layers, experts, generator=generator)
    # Stable: of equal draws the lower index counts as the larger.
    best = draws.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return (draws >= probability).scatter(-1, best, True)


class AmongKept(TorchFunctionMode):
    """Inside, a top-k choice among the last of two dimensions, of this many experts, is one among the kept ones.

    Scores are otherwise used as they are, so no weight of an expert depends on others being left out, except where a
    model divides the chosen ones' weights by their sum. Other calls of `topk` (groups of experts) are left alone.

    Attributes:
        choices: how often this happened.
    """

    def __init__(self, kept: Tensor, top_k: int) -> None:
        """
        Args:
            kept: bool (experts,), True for at least `top_k`.
        """
        super().__init__()
        self.kept, self.top_k, self.choices = kept, top_k, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.topk, Tensor.topk):
            args = list(args)
            scores = args.pop(0) if args else kwargs.pop("input")
            k = args[0] if args else kwargs.get("k")
            if scores.ndim == 2 and scores.shape[-1] == len(self.kept) and k == self.top_k:
                self.choices += 1
                scores = scores.masked_fill(~self.kept.to(scores.device), float("-inf"))
            return func(scores, *args, **kwargs)
        return func(*args, **kwargs)
