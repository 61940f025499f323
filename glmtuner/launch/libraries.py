"""Imports torch, transformers and PEFT, silently and together."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def load_libraries(*, compiles: bool, trains: bool) -> None:
    """Import the parts of torch, transformers and PEFT that a run needs, silently and together.

    Two things that slow down these imports are switched off meanwhile: the garbage collector, which would traverse all imported
    objects again and again without freeing any, and torch.compile, unless the run `compiles`: bitsandbytes, which PEFT imports
    if it is installed, calls it for the kernels that it has in plain torch, which loads TorchInductor.
    """
    quieten_libraries()
    # batches of varying length fragment a GPU's memory; expandable segments avoid that
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    user_setting = os.environ.get("TORCHDYNAMO_DISABLE")
    is_first_import = "torch" not in sys.modules  # in a later job of a sweep, gc.freeze might keep a model alive
    if is_first_import:
        gc.disable()
    if not compiles:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import peft  # noqa: F401
        import transformers

        import glmtuner.models  # noqa: F401

        if trains:
            # draws a number from `random` when it is imported; after the seed is set, that would make the random states in
            # the checkpoints of a process's first run differ from those of its later ones
            import rich.style  # noqa: F401

            with unused_trackers_hidden():
                from transformers import Trainer  # noqa: F401
    finally:
        if user_setting is None:
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = user_setting
        if is_first_import:
            gc.freeze()  # modules live as long as the process: later collections skip them
            gc.enable()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def unused_trackers_hidden() -> Iterator[None]:
    """Within it, transformers' Trainer can be imported without what its integrations do at once, whatever the tracker.

    They import Comet if it is installed, which then hooks into torch, and print a line if W&B's mode is offline.
    """
    mode, is_hidden = os.environ.pop("WANDB_MODE", None), "comet_ml" not in sys.modules
    if is_hidden:
        sys.modules["comet_ml"] = None  # type: ignore[assignment]  # an import of it raises ModuleNotFoundError
    try:
        yield
    finally:
        if mode is not None:
            os.environ["WANDB_MODE"] = mode
        if is_hidden:
            del sys.modules["comet_ml"]


def quieten_libraries() -> None:
    """Silence the libraries' messages about normal operation, so that progress and glmtuner's own lines remain."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports missing kernels that it does not need
    # PEFT still uses names that transformers renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # and looks for routed experts, which are parameters, among the modules alone
    warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .*gate_up_proj'\]", RuntimeWarning)
