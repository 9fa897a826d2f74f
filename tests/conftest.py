"""Tests run without a network, and hypothesis draws the same examples everywhere."""

import os


# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings


# No deadline: on a busy machine the first call of a torch kernel can take longer than any sensible one.
settings.register_profile("sparse_hf", deadline=None, derandomize=True)
settings.load_profile("sparse_hf")


@pytest.fixture(scope="session")
def compiled_loops():
    """Skips where there are none."""
    from sparse_hf.algorithms.vector_loops import vector_loops

    if vector_loops(2) is None:
        pytest.skip("needs llvmlite and a processor with AVX-512 VBMI2")


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def each_codec(request):
    """Tensors of every size are compressed by numpy alone, then by compiled loops."""
    from sparse_hf.algorithms import nonzeros

    if request.param == "compiled":
        request.getfixturevalue("compiled_loops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonzeros, "WORTH_COMPILING", 0 if request.param == "compiled" else 1 << 62)
        yield
