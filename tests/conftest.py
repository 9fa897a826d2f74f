"""Tests run without a network, and hypothesis draws the same examples everywhere."""

import os


# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings


# No deadline: on a busy machine the first call of a torch kernel can take longer than any sensible one.
settings.register_profile("sparse_hf", deadline=None, derandomize=True)
settings.load_profile("sparse_hf")


@pytest.fixture(scope="module", params=["numpy", "scalar", "vector"])
def each_codec(request):
    """Tensors of every size are compressed by numpy alone, then by compiled loops of each kind."""
    from kinds_of_loops import loops_of
    from sparse_hf.algorithms import nonzeros

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(nonzeros, "compiled_loops", lambda itemsize: None)
        else:
            loops = {itemsize: loops_of(request.param, itemsize) for itemsize in (1, 2, 4, 8)}
            patch.setattr(nonzeros, "WORTH_COMPILING", 0)
            patch.setattr(nonzeros, "compiled_loops", loops.get)
        yield
