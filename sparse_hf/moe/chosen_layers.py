"""Which layers become mixtures of experts?"""

from collections.abc import Sequence

from sparse_hf.moe.targets import Target


def chosen_layers(target: Target, count: int, layers: Sequence[int] | str | None) -> frozenset[int]:
    """Some of `count` layers; all for None.

    Args:
        layers: numbers, or a text such as "4-31" (both included), "every-2" (layers 1, 3, 5, ..., the last of each
            two) or "0,3,5-7".

    Raises:
        ValueError: there are no such layers, or the target has no dense ones.
    """
    if isinstance(layers, str):
        layers = _parsed(layers, count)
    chosen = frozenset(range(count) if layers is None else layers)
    outside = sorted(layer for layer in chosen if type(layer) is not int or not 0 <= layer < count)
    if outside or not chosen:
        raise ValueError(f"`layers` must name some of the layers 0 to {count - 1}, got {layers!r}.")
    if len(chosen) < count and target.dense_layers is None:
        raise ValueError(
            f"A {target.model_type} model has a mixture in every layer, got `layers` = {sorted(chosen)}: leave it out."
        )
    return chosen


def _parsed(text: str, count: int) -> list[int]:
    every, _, step = text.partition("every-")
    if not every and step.isdecimal() and int(step):
        return list(range(int(step) - 1, count, int(step)))
    found = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) >= count:
            raise ValueError(
                f"`layers` must be such as 4-31, every-2 or 0,3,5-7 with layers 0 to {count - 1}, got {text!r}."
            )
        found += range(int(first), int(last or first) + 1)
    return found
