"""How many experts per token after this many steps? Numbers in, one number out."""

import math
from typing import Literal


Shape = Literal["linear", "cosine", "exponential"]


def scheduled_top_k(step: int, steps: int, start: int, end: int, shape: Shape) -> int:
    """Experts per token after `step` of `steps` optimizer steps: `start` at 0, `end` from `steps` on.

    With t = step / steps, before rounding to the nearest (halves go up):

    - `"linear"`: start + (end - start) t, SMoE-Dropout's (Chen et al. 2023). Its released code also grows k by a
      cosine and exponentially; these two curves are ours:
    - `"cosine"`: start + (end - start) (1 - cos(pi t)) / 2, slow at both ends.
    - `"exponential"`: start (end / start)^t, the same factor per step, slow at first.

    Args:
        step: optimizer steps done, at least 0.
        steps: after which `end` is reached, at least 1.
        start: at least 1; it may be more than `end`, then k falls.
        end: at least 1.

    Raises:
        ValueError: a number is out of its range, or the shape is unknown.
    """
    for name, value, least in (("step", step, 0), ("steps", steps, 1), ("start", start, 1), ("end", end, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    done = min(step / steps, 1.0)
    curves = {
        "linear": start + (end - start) * done,
        "cosine": start + (end - start) * (1 - math.cos(math.pi * done)) / 2,
        "exponential": start * (end / start) ** done,
    }
    if shape not in curves:
        raise ValueError(f"Unknown shape {shape!r}. Choose one of: {', '.join(curves)}.")
    return math.floor(curves[shape] + 0.5)
