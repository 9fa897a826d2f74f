"""Which tokens of a batch count, and which are padding?"""

import torch
from torch import Tensor


def counted_tokens(attention_mask: object, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool (tokens,): those that are not padding.

    Args:
        attention_mask: (batch, length), 0 = padding; None: all tokens count.
        tokens: batch x length.
        device: of the result.

    Raises:
        ValueError: the mask is not (batch, length) as the tokens are, such as a 4-D mask, which says what may be
            looked at, not what is padding.
    """
    if attention_mask is None:
        return torch.ones(tokens, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.numel() != tokens:
        found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"`attention_mask` must tell padding of the {tokens} tokens as (batch, length), got {found}. Leave it out "
            "where there is no padding."
        )
    return (attention_mask != 0).reshape(-1).to(device)
