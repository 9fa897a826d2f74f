"""Tests run without a network, and hypothesis draws the same examples everywhere."""

import os


# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings


# No deadline: on a busy machine the first call of a torch kernel can take longer than any sensible one.
settings.register_profile("sparse_hf", deadline=None, derandomize=True)
settings.load_profile("sparse_hf")
