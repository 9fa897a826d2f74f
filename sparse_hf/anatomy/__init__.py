"""Where the weights of a Transformers model are, and what they are called."""

from sparse_hf.anatomy.canonical_names import (
    HeadNames,
    canonical_name,
    canonical_names,
    full_name,
    head_names,
    named_canonical_parameters,
)
from sparse_hf.anatomy.sites import Site, find_sites


__all__ = [
    "HeadNames",
    "Site",
    "canonical_name",
    "canonical_names",
    "find_sites",
    "full_name",
    "head_names",
    "named_canonical_parameters",
]
