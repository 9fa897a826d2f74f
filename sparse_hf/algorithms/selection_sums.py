"""How many bytes do ranks add up to choose one mask together?

What `keep_largest` sends over shards, counted by the same rules: sums of counts, never weights. Known before there are
any weights, since it depends on sizes alone.
"""

from collections.abc import Sequence

import torch

from sparse_hf.algorithms.global_selection import UNSAMPLED
from sparse_hf.algorithms.order_statistic import DIGIT_BITS, PROBES


COUNT = torch.int64.itemsize  # what travels are counts


def bytes_of_selection(numels: Sequence[int], min_per_tensor: int = 1) -> int:
    """Bytes in all sums of one `keep_largest` over tensors of these sizes, in the usual case.

    `keep_largest_each` chooses in one tensor after the other, as far as bytes go: add up those of each alone.

    The usual case: fp32 scores (fp64 ones double the larger sums), a threshold inside the bracket that a sample gave,
    and no tensor that falls below `min_per_tensor`; a bracket that misses or a starved tensor costs a selection more.

    Args:
        numels: weights of each whole tensor.
        min_per_tensor: as for `keep_largest`.

    Returns:
        the sum of the sizes of what is given to `all_reduce_sum`. An all-reduce in a ring of n ranks sends
        2 (n - 1) / n times that from each.
    """
    tensors, total = len(numels), sum(numels)
    agreeing = 1 + 2 * tensors
    scanning = 2 + tensors
    # Two thresholds bracket a third one, unless there are too few values to bother.
    bracketing = 1 + 2 * _digits() if total > UNSAMPLED else 0
    inside = _digits() + _probes(total)
    floors = tensors if min_per_tensor else 0
    return COUNT * (agreeing + bracketing + scanning + inside + floors)


def _digits() -> int:
    """Counts of one k-th largest fp32 value, a digit at a time."""
    return (32 // DIGIT_BITS) << DIGIT_BITS


def _probes(total: int) -> int:
    """Counts by which the position of the last tie is found."""
    found, span = 0, max(total, 1)
    while span > 1:
        step = -(-span // PROBES)
        found += -(-span // step)
        span = step
    return found
