"""Which experts stay, and which of them does every other one join?"""

from collections.abc import Sequence

import numpy as np

from sparse_hf.moe.read_mixture import StoredMixture
from sparse_hf.storage.piece_bytes import SourceFiles, decode
from sparse_hf.storage.pieces import NUMBER_BYTES
from sparse_hf.storage.tensor_headers import StoredTensor


# The old experts that each new one is made of; the first of them is the one that is kept.
Groups = tuple[tuple[int, ...], ...]


def most_used(values: Sequence[float], keep: int, parts: int) -> list[int]:
    """The `keep` experts that are used most, ascending; of equally used ones the first.

    Args:
        values: how much each expert is used.
        parts: how many neighbouring experts stay or go together; it divides their number and `keep`.
    """
    copies = [sum(values[first : first + parts]) for first in range(0, len(values), parts)]
    best = sorted(range(len(copies)), key=lambda copy: (-copies[copy], copy))[: keep // parts]
    return [copy * parts + part for copy in sorted(best) for part in range(parts)]


def most_similar(mixture: StoredMixture, layer: int, kept: list[int], parts: int) -> Groups:
    """Every expert that is not kept joins the kept one whose router row is most like its own, by their cosine.

    The layer's mean row is taken from all rows first.

    Args:
        parts: how many neighbouring experts belong together; an expert joins one of the same place among them.

    Raises:
        ValueError: the router is in a dtype that is only copied.
    """
    router = _router_rows(mixture.layers[layer].router)
    router = router - router.mean(axis=0)
    lengths = np.linalg.norm(router, axis=1, keepdims=True)
    unit = router / np.where(lengths > 0, lengths, 1)
    groups = {expert: [expert] for expert in kept}
    for expert in range(mixture.experts):
        if expert not in groups:
            choices = [one for one in kept if one % parts == expert % parts]
            # In steps of 1e-9, so that equal rows tie however their products are summed.
            similarity = np.round(unit[choices] @ unit[expert], 9)
            groups[choices[int(similarity.argmax())]].append(expert)
    return tuple(tuple(members) for members in groups.values())


def _router_rows(router: StoredTensor) -> np.ndarray:
    """float64 of shape (experts, hidden)."""
    if router.dtype not in NUMBER_BYTES:
        raise ValueError(
            f"Routers are compared in {', '.join(NUMBER_BYTES)}, got {router.dtype}: drop experts instead."
        )
    with SourceFiles() as sources:
        data = sources.read(router.file, router.offset, router.length)
    return decode(data, router.dtype).reshape(router.shape).astype(np.float64)
