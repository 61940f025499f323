"""torch, transformers and PEFT, imported silently and at once."""

import gc
import logging
import os
import sys
import warnings


def load_libraries(*, compiles: bool, trains: bool) -> None:
    """Import what a run needs of torch, transformers and PEFT, silently and at once.

    What makes these imports slow is switched off while they last: the garbage collector, which would look again and again
    through all that was imported and finds nothing to free; and, where nothing `compiles`, torch.compile. bitsandbytes,
    which PEFT imports wherever it is installed, calls it for the kernels that it writes in plain torch, and TorchInductor
    is loaded for them.
    """
    quieten_libraries()
    # rows of ever other lengths leave holes in a GPU's memory; segments that grow have none
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    compiling = os.environ.get("TORCHDYNAMO_DISABLE")
    first = "torch" not in sys.modules  # later, in the next job of a sweep, a frozen object might be a model
    if first:
        gc.disable()
    if not compiles:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import peft  # noqa: F401
        import transformers

        import glmtuner.models  # noqa: F401

        if trains:
            from transformers import Trainer  # noqa: F401
    finally:
        if compiling is None:
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = compiling
        if first:
            gc.freeze()  # modules stay to the end: no later collection looks through them
            gc.enable()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def quieten_libraries() -> None:
    """Progress and our own lines only; the libraries' chatter about what works as intended is left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels it can do without
    # PEFT still uses names that transformers renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
