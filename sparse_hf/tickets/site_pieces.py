"""Which weights of each site does this rank hold? All of them, unless parameters are sharded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_hf.algorithms.block_scan import count_kept
from sparse_hf.algorithms.shard_layout import ShardLayout
from sparse_hf.algorithms.sharded_tensors import first_row, is_sharded, local_part, sum_over_ranks
from sparse_hf.algorithms.zero_partitions import Partition, is_partitioned, partition_of
from sparse_hf.anatomy.sites import Site


@dataclass(frozen=True)
class SitePiece:
    """The neighbouring weights of one site that this rank holds.

    Attributes:
        position: of the site in the list of sites.
        parameter: canonical name of the parameter that stores it.
        start: flat index of the piece's first weight in the whole site.
        within: which entry or entries of this rank's part of the parameter it is; None for all of that part.
    """

    position: int
    parameter: str
    start: int
    within: int | slice | None

    def part(self, local: Tensor) -> Tensor:
        """The piece in a tensor shaped like this rank's part of the parameter: a view."""
        return local if self.within is None else local[self.within]


@dataclass(frozen=True)
class SitePieces:
    """The pieces of all sites that this rank holds, at most one of each, with the layout of the whole."""

    sites: Sequence[Site]
    pieces: tuple[SitePiece, ...]
    layout: ShardLayout

    @cached_property
    def numbers(self) -> dict[int, int]:
        """The number of the piece of each site that has one here, by the site's position."""
        return {piece.position: number for number, piece in enumerate(self.pieces)}

    def take(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Each piece in parameters, gradients or masks: sharded ones, or this rank's parts."""
        return [piece.part(local_part(tensors[piece.parameter])) for piece in self.pieces]

    def totals(self, masks: Sequence[Tensor]) -> list[int]:
        """How many entries are True in each whole site, from a mask of each piece; all ranks ask together."""
        counts = [0] * len(self.sites)
        for piece, mask in zip(self.pieces, masks, strict=True):
            counts[piece.position] = count_kept(mask)
        return self.layout.all_reduce_sum(torch.tensor(counts, dtype=torch.int64)).tolist()

    def join(self, masks: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of this rank's parts of the parameters from a mask of each piece."""
        joined: dict[str, Tensor] = {}
        for piece, mask in zip(self.pieces, masks, strict=True):
            if piece.within is None:
                joined[piece.parameter] = mask
                continue
            if piece.parameter not in joined:
                # Experts that are no site (excluded by a pattern) stay dense.
                joined[piece.parameter] = _all_kept(parameters[piece.parameter])
            piece.part(joined[piece.parameter]).copy_(mask)
        # A rank may hold nothing of a parameter, and the order is the sites' on all ranks.
        return {
            name: joined[name] if name in joined else _all_kept(parameters[name])
            for name in dict.fromkeys(site.parameter for site in self.sites)
        }


def _all_kept(parameter: Tensor) -> Tensor:
    local = local_part(parameter)
    return torch.ones(local.shape, dtype=torch.bool, device=local.device)


def pieces_of(sites: Sequence[Site], parameters: Mapping[str, Tensor]) -> SitePieces:
    """The pieces of `sites` in `parameters`, which map canonical names to tensors, sharded or not.

    Raises:
        ValueError: a parameter is sharded in a way that is not known, or whole beside sharded ones, or shaped
            otherwise than its site says.
    """
    found = []
    for position, site in enumerate(sites):
        parameter = parameters[site.parameter]
        if not is_sharded(parameter):
            site.part(parameter.detach())  # its shape is checked
        piece = _piece(position, site, parameter)
        if piece is not None:
            found.append(piece)
    stored = {site.parameter: parameters[site.parameter] for site in sites}
    whole = [name for name, parameter in stored.items() if not is_sharded(parameter)]
    if 0 < len(whole) < len(stored):  # its weights would be counted once per rank
        raise ValueError(
            f"Either all of the weights to choose from are sharded or none is, got `{whole[0]}` whole beside sharded "
            "ones. Load the model with `fsdp_size`, or exclude it."
        )
    layout = ShardLayout(
        numels=tuple(math.prod(site.shape) for site in sites),
        tensors=tuple(piece.position for piece in found),
        starts=tuple(piece.start for piece in found),
        all_reduce_sum=sum_over_ranks(stored.values()),
    )
    return SitePieces(sites, tuple(found), layout)


def _piece(position: int, site: Site, parameter: Tensor) -> SitePiece | None:
    """None if this rank holds nothing of the site."""
    if is_partitioned(parameter):
        return _piece_of_run(position, site, partition_of(parameter))
    first, rows = first_row(parameter), local_part(parameter).shape[0]
    if site.expert is None:
        start = first * math.prod(parameter.shape[1:])
        return SitePiece(position, site.parameter, start, None) if rows else None
    if first <= site.expert < first + rows:
        return SitePiece(position, site.parameter, 0, site.expert - first)
    return None


def _piece_of_run(position: int, site: Site, run: Partition) -> SitePiece | None:
    """What a run of neighbouring weights holds of the site, which is itself a run of its parameter."""
    size = math.prod(site.shape)
    site_start = size * (site.expert or 0)
    first, end = max(site_start, run.start), min(site_start + size, run.start + run.weights.numel())
    if first >= end:
        return None
    fills_run = end - first == run.weights.numel()  # its mask is then the parameter's, without a copy
    within = None if fills_run else slice(first - run.start, end - run.start)
    return SitePiece(position, site.parameter, first - site_start, within)
