"""Which sequence is each token of a batch part of?"""

from collections.abc import Mapping

import torch
from torch import Tensor


# Tensors that have one row per sequence.
ROWS = ("attention_mask", "input_ids", "inputs_embeds", "pixel_values")
# Collators that pack several sequences into a row tell the places by one of these too.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def sequence_numbers(inputs: Mapping[str, object], tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """Of which sequence each token is, int64 (tokens,), and how many there are: the rows, or the parts of packed rows.

    A part begins where `position_ids` do not go on growing. To count parts, the device is waited for, once; without
    `position_ids` it is not. Sequences that are padding alone may be among them.

    Args:
        inputs: those of the model.
        tokens: of all rows, padding included.

    Raises:
        ValueError: rows, or the parts of packed ones, cannot be told.
    """
    rows = next((len(one) for name in ROWS if isinstance(one := inputs.get(name), Tensor)), 0)
    if rows == 0 or tokens % rows:
        raise ValueError(
            f"A loss within sequences must know which of the {tokens} tokens are one sequence, but none of "
            f"{', '.join(f'`{name}`' for name in ROWS)} tells. Set `sequence` to 0."
        )
    numbers = torch.arange(tokens, device=device) // (tokens // rows)
    positions = inputs.get("position_ids")
    if positions is None:
        packed = [name for name in PACKED if inputs.get(name) is not None]
        if packed:
            raise ValueError(
                f"Sequences in packed rows are told by `position_ids`, got `{packed[0]}` without. Let the collator "
                "return them (`return_position_ids=True`), or set `sequence` to 0."
            )
        return numbers, rows
    if not isinstance(positions, Tensor) or positions.ndim != 2 or rows * positions.shape[1] != tokens:
        found = list(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(
            f"`position_ids` must be (batch, length) for a loss within sequences, got {found} for {rows} rows of "
            f"{tokens // rows} tokens. Set `sequence` to 0."
        )
    positions = positions.to(device).expand(rows, -1)
    starts = torch.ones_like(positions, dtype=torch.int64)
    starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    numbers = starts.flatten().cumsum(0) - 1
    return numbers, int(numbers[-1]) + 1
