"""Compiled loops of each kind, whatever this processor would take by itself."""

import pytest

from sparse_hf.algorithms.compiled_loops import CompiledLoops, can_move_vectors


def loops_of(kind: str, itemsize: int) -> CompiledLoops:
    """Those "scalar" or "vector"; skips where there are none."""
    pytest.importorskip("llvmlite", minversion="0.45")
    if kind == "vector" and not can_move_vectors():
        pytest.skip("needs a processor with AVX-512 VBMI2")
    return CompiledLoops(itemsize, kind == "vector")
