"""Where every four neighbours keep exactly N: which of the few patterns each group has, several groups to a byte.

2:4 has 6 patterns, three groups make a number below 216, and a weight takes 0.67 bits; 1:4 and 3:4 have 4 patterns,
four groups to a byte, half a bit. Two-bit indices as sparse tensor cores take them would need a bit per weight for
2:4, as much as the bitmask.
"""

import numpy as np

from sparse_hf.algorithms.nonzeros import BLOCK, expand_bitmask, kept_blocks


# The patterns of a group with N of its four bits set, in rising order; a group's code is its place in this list.
PATTERNS = {kept: [bits for bits in range(16) if bits.bit_count() == kept] for kept in (1, 2, 3)}
GROUPS_PER_BYTE = {1: 4, 2: 3, 3: 4}


def kept_of_4(size: int, count: int) -> int | None:
    """The N that `count` of `size` elements would mean: 1, 2 or 3; None where no N gives that count."""
    kept, rest = divmod(4 * count, size) if size and size % 4 == 0 else (0, 0)
    return kept if kept in PATTERNS and not rest else None


def code_bytes(size: int, count: int) -> int:
    """The length of the code in bytes."""
    return -(-size // (4 * GROUPS_PER_BYTE[kept_of_4(size, count)]))


def obeys_n_of_4(elements: np.ndarray, count: int) -> bool:
    """Whether every four neighbours of the 1-D unsigned integers hold as many that are not zero as any other four."""
    kept = kept_of_4(len(elements), count)
    if kept is None:
        return False
    fits = np.isin(np.arange(16), PATTERNS[kept])
    both = np.logical_and.outer(fits, fits).ravel()  # of the two groups in a byte
    for start in range(0, len(elements), BLOCK):
        pairs = np.packbits(elements[start : start + BLOCK] != 0, bitorder="little")
        if len(elements) % 8 and start + BLOCK >= len(elements):
            pairs[-1] |= PATTERNS[kept][0] << 4  # the last group is alone
        if not both.take(pairs).all():
            return False
    return True


def compress_n_of_4(elements: np.ndarray, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The elements that are not zero, and the code of their places.

    Args:
        elements: 1-D, unsigned integers that `obeys_n_of_4` agrees to.
        count: how many of them are not zero.

    Returns:
        The values, in pieces; uint8 of `code_bytes(n, count)` bytes. The first group of a byte is its lowest digit,
        to the base of the number of patterns; digits beyond the last group are 0.
    """
    kept = kept_of_4(len(elements), count)
    digit_of = np.zeros(16, np.uint8)
    digit_of[PATTERNS[kept]] = range(len(PATTERNS[kept]))
    per_byte = GROUPS_PER_BYTE[kept]
    values, done = [], 0
    digits = np.zeros(per_byte * code_bytes(len(elements), count), np.uint8)
    for block in kept_blocks(elements, few=False):
        halves = np.stack([block.bits & 15, block.bits >> 4], axis=1).ravel()[: block.size // 4]
        digits[done : done + len(halves)] = digit_of[halves]
        done += len(halves)
        values.append(block.values)
    weights = len(PATTERNS[kept]) ** np.arange(per_byte)
    return values, digits.reshape(-1, per_byte) @ weights.astype(np.uint8)


def expand_n_of_4(values: np.ndarray, code: np.ndarray, out: np.ndarray) -> None:
    """Undo `compress_n_of_4` into `out`, n zeros of the dtype of `values`.

    Raises:
        ValueError: a byte stands for no patterns, or digits beyond the last group are not 0.
    """
    kept = kept_of_4(len(out), len(values))
    base, per_byte, groups = len(PATTERNS[kept]), GROUPS_PER_BYTE[kept], len(out) // 4
    if len(code) and int(code.max()) >= base**per_byte:
        raise ValueError(f"the code holds a byte above {base**per_byte - 1}")
    if groups % per_byte and int(code[-1]) >= base ** (groups % per_byte):
        raise ValueError("a spare digit of the code is set")
    digits = np.arange(base**per_byte)[:, None] // base ** np.arange(per_byte) % base
    halves = np.array(PATTERNS[kept], np.uint8)[digits].take(code, axis=0).ravel()[: groups + groups % 2]
    if groups % 2:  # `halves` may end with the last group
        halves = np.append(halves[:groups], np.uint8(0))
    expand_bitmask(values, halves[0::2] | halves[1::2] << 4, out)
