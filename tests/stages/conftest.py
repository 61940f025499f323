"""Imports that the runs of these tests share."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """torch, transformers and PEFT, out of the way of the garbage collections of every training."""
    import peft  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()
