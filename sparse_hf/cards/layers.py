"""Where in a model is a matrix, to judge by its name?"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


OUTSIDE = -1  # the layer of what is in no layer


@dataclass(frozen=True)
class MatrixZeros:
    """How many entries of one matrix, or of a stack of them, are zero."""

    name: str
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class LayerZeros:
    """The matrices of one layer together."""

    stack: str
    layer: int
    matrices: tuple[MatrixZeros, ...]

    @property
    def name(self) -> str:
        """As people say it: "encoder.layer 3", or "outside the layers"."""
        return "outside the layers" if self.layer == OUTSIDE else f"{self.stack} {self.layer}".strip()

    @property
    def weights(self) -> int:
        """Number of entries."""
        return sum(one.weights for one in self.matrices)

    @property
    def zeros(self) -> int:
        """Number of zeros among them."""
        return sum(one.zeros for one in self.matrices)


def place(name: str) -> tuple[str, int, str]:
    """Stack of layers, layer (-1 outside), kind of matrix: "encoder.layer", 3, "attention.self.query"."""
    stack, layer, kind = re.fullmatch(
        r"(?:(.*?)\.([0-9]{1,6})\.)?(.*?)(?:\.weight)?(?:\[\d+\])?", name, re.DOTALL
    ).groups()
    return stack or "", OUTSIDE if layer is None else int(layer), kind


def by_layer(matrices: Iterable[MatrixZeros]) -> list[LayerZeros]:
    """The matrices by layer, stacks in the order in which they come, what is outside of layers last."""
    gathered: dict[tuple[str, int], list[MatrixZeros]] = {}
    for one in matrices:
        stack, layer, _ = place(one.name)
        gathered.setdefault((stack, layer), []).append(one)
    stacks = list(dict.fromkeys(stack for stack, layer in gathered if layer != OUTSIDE))
    order = sorted(gathered, key=lambda key: (len(stacks) if key[1] == OUTSIDE else stacks.index(key[0]), key[1]))
    return [LayerZeros(stack, layer, tuple(gathered[stack, layer])) for stack, layer in order]
