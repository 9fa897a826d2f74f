"""How sparse at this round or step: numbers in, one sparsity in [0, 1) out.

A sparsity is a fraction of the ORIGINAL number of prunable weights; `budgets.num_kept` turns it into a count.
"""


def linear_sparsity(round: int, rounds: int, final: float) -> float:
    """`final * round / rounds`: every round removes the same number of weights.

    This is what the BERT-Tickets code does (10 % of the original weights per round), while its paper's wording
    (10 % of what remains) is `geometric_sparsity`.

    Args:
        round: rounds of pruning done, 0 (dense) to `rounds`.
        rounds: number of pruning rounds, at least 1.
        final: sparsity after the last round, in [0, 1).

    Raises:
        ValueError: a number is out of its range.
    """
    _check_round(round, rounds)
    _check_sparsity("final", final)
    return final * (round / rounds)


def geometric_sparsity(round: int, rounds: int, final: float) -> float:
    """`1 - (1 - final) ** (round / rounds)`: every round removes the same fraction of the weights that remain.

    Structure-LTH removes 20 % of the remaining weights per round: 0.8 ** round remain.

    Args:
        round: rounds of pruning done, 0 (dense) to `rounds`.
        rounds: number of pruning rounds, at least 1.
        final: sparsity after the last round, in [0, 1).

    Raises:
        ValueError: a number is out of its range.
    """
    _check_round(round, rounds)
    _check_sparsity("final", final)
    if round == rounds:
        return final  # 1 - (1 - final) can miss it by one unit in the last place
    return 1 - (1 - final) ** (round / rounds)


def cubic_sparsity(step: int, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """Gradual pruning of Zhu & Gupta (2017): fast at first, slower as fewer weights remain.

    `final + (initial - final) * (1 - (step - start) / (end - start)) ** 3` between `start` and `end`,
    `initial` before, `final` after.

    Args:
        step: optimizer steps done, at least 0.
        start: step at which pruning begins.
        end: first step with the final sparsity, after `start`.
        final: sparsity from `end` on, in [0, 1).
        initial: sparsity up to `start`, in [0, 1), at most `final`.

    Raises:
        ValueError: a number is out of its range.
    """
    _check_sparsity("final", final)
    _check_sparsity("initial", initial)
    if initial > final:
        raise ValueError(
            f"`initial` must be at most `final` ({final}), got {initial}: pruned weights do not come back."
        )
    if not 0 <= start < end:
        raise ValueError(
            f"`start` and `end` must satisfy 0 <= start < end, got {start} and {end}: widen the interval."
        )
    if step < 0:
        raise ValueError(f"`step` must be at least 0, got {step}: count optimizer steps from 0.")
    remaining = 1 - (min(max(step, start), end) - start) / (end - start)
    return final + (initial - final) * remaining**3


def _check_round(round: int, rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}: ask for one round to prune in one shot.")
    if not 0 <= round <= rounds:
        raise ValueError(f"`round` must be in 0..{rounds}, got {round}: 0 is dense, `rounds` is the final sparsity.")


def _check_sparsity(name: str, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"`{name}` must be a sparsity in [0, 1), got {sparsity}: 0.6 removes 60 % of the weights.")
