"""Is this the base model a ticket was found on?"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_hf.algorithms.bits import unpack_bits
from sparse_hf.algorithms.masking import sign_extended, zero_pruned_
from sparse_hf.algorithms.sharded_tensors import local_part, whole_of
from sparse_hf.tickets.fit import may_be_missing


@torch.no_grad()
def base_fingerprint(parameters: Mapping[str, Tensor], bits: Mapping[str, Tensor]) -> str:
    """SHA-256 of the kept weights without those of poolers, rounded to bfloat16.

    Only kept weights count, so a model to which the ticket was applied keeps its fingerprint; rounding makes a model
    loaded in bfloat16 equal to its float32 original.

    Args:
        parameters: the base model's parameters by canonical name, at least those of the ticket. If they are sharded,
            all ranks call this together, and one whole matrix at a time is in memory.
        bits: packed masks by canonical name.
    """
    digest = hashlib.sha256()
    for name in sorted(bits):
        if may_be_missing(name):
            continue  # else the same base would have another fingerprint under a head that leaves it out
        whole = whole_of(local_part(parameters[name]), parameters[name])
        rounded = whole.to(device="cpu", dtype=torch.bfloat16, copy=True).contiguous()
        mask = unpack_bits(bits[name], tuple(rounded.shape))
        zero_pruned_(rounded, sign_extended(mask))
        digest.update(f"{name}{list(rounded.shape)}".encode())
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
