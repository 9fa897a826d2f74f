"""How do several computations share their sums over ranks?

A computation that needs sums is a generator: it yields this rank's counts, a 1-D int64 array, and gets back those of
all ranks added up. So it does not know how many others run beside it, and what all of them want goes into one sum.
Every rank runs the same computations in the same order; what they decide, they decide on sums, hence alike.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor


Result = TypeVar("Result")
Summing = Generator[np.ndarray, np.ndarray, Result]


def alone(counts: Tensor) -> Tensor:
    """`all_reduce_sum` of a process that shares its weights with no other."""
    return counts


def added_up(computation: Summing[Result], all_reduce_sum: Callable[[Tensor], Tensor]) -> Result:
    """The result of one computation, whose sums are made by the `all_reduce_sum` of a `ShardLayout`."""
    sums = None
    while True:
        try:
            counts = computation.send(sums)
        except StopIteration as end:
            return end.value
        sums = all_reduce_sum(torch.from_numpy(counts)).numpy()


def each_added_up(computations: Sequence[Summing[Result]], all_reduce_sum: Callable[[Tensor], Tensor]) -> list[Result]:
    """The results of all computations, with as many sums as the longest of them makes.

    Without other ranks there is nothing to share: one is then finished before the next begins, so that only one holds
    what it has collected.
    """
    if all_reduce_sum is alone:
        return [added_up(one, all_reduce_sum) for one in computations]
    return added_up(together(computations), all_reduce_sum)


def together(computations: Sequence[Summing[Result]]) -> Summing[list[Result]]:
    """Many computations as one, whose every sum is what all unfinished ones want, end to end.

    Raises:
        ValueError: of the first in order that raises one, as if they had run one after the other.
    """
    results: list[Result | None] = [None] * len(computations)
    answers: dict[int, np.ndarray | None] = dict.fromkeys(range(len(computations)))
    failure = None
    while answers:
        wanted: dict[int, np.ndarray] = {}
        for number, answer in answers.items():
            try:
                wanted[number] = computations[number].send(answer)
            except StopIteration as end:
                results[number] = end.value
            except ValueError as error:
                failure = error
                break  # only those before it go on, which may fail as well
        answers = {}
        if wanted:
            sums = yield np.concatenate(list(wanted.values()))
            ends = np.cumsum([counts.size for counts in wanted.values()])
            answers = dict(zip(wanted, np.split(sums, ends[:-1]), strict=True))
    if failure is not None:
        raise failure
    return results


def summed(*counts: int) -> Summing[list[int]]:
    """These numbers, over all ranks."""
    return (yield np.array(counts, dtype=np.int64)).tolist()
