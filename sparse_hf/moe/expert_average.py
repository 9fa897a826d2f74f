"""How is one expert's matrix made of several?"""

from collections.abc import Sequence

from sparse_hf.storage.piece_bytes import READ_BYTES, SourceFiles
from sparse_hf.storage.pieces import NUMBER_BYTES, CopyBytes, Term, WeightedSum
from sparse_hf.storage.tensor_headers import StoredTensor


def weighted_mean(parts: Sequence[StoredTensor], weights: Sequence[float]) -> CopyBytes | WeightedSum:
    """The mean of matrices of one shape and dtype, weighted; a plain mean where all weights are 0.

    Matrices that are equal byte for byte, as copies are before training, give exactly themselves, which a sum of
    rounded fractions would not. So the sources are compared here, block by block: of different ones little is read.

    Args:
        weights: 0 or more, one per matrix.

    Raises:
        ValueError: different matrices in a dtype that is only copied.
    """
    if not any(weights):
        weights = [1.0] * len(parts)
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    pieces = [CopyBytes(part.file, part.offset, part.length) for part, _ in used]
    if _equal(pieces):
        return pieces[0]
    dtype, total = parts[0].dtype, sum(weights)
    if dtype not in NUMBER_BYTES:
        raise ValueError(
            f"Experts are averaged in {', '.join(NUMBER_BYTES)}, got `{parts[0].name}` in {dtype}: dequantise the "
            "checkpoint, or drop experts instead."
        )
    terms = tuple(Term(weight / total, piece, dtype) for piece, (_, weight) in zip(pieces, used, strict=True))
    return WeightedSum(terms, dtype)


def _equal(pieces: Sequence[CopyBytes]) -> bool:
    """Whether the bytes of all pieces, which are equally long, are the same."""
    with SourceFiles() as sources:
        for start in range(0, pieces[0].length if len(pieces) > 1 else 0, READ_BYTES):
            count = min(READ_BYTES, pieces[0].length - start)
            first = sources.read(pieces[0].file, pieces[0].offset + start, count)
            for other in pieces[1:]:
                if sources.read(other.file, other.offset + start, count) != first:
                    return False
    return True
