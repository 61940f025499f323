"""Which of a repository's files make a model: what transformers reads, and no second copy of the weights in another format."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

# Weights of other libraries, and of transformers' older formats beside safetensors.
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".tflite",
    ".npz",
)
NOT_READ = (".md", ".png", ".jpg", ".jpeg", ".gif", ".pdf", ".py", ".ipynb", ".mp4", ".zip", ".tar", ".gz")
MAIN = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
OTHERS = re.compile(r"(value_head|ice_text|adapter_model)\.\w+")  # small ones that stand beside the weights
TEMPLATES = "additional_chat_templates"  # the one folder that transformers looks into


def small_files(paths: Iterable[str]) -> list[str]:
    """The files that describe a model: configuration, tokenizer and templates, no weights."""
    return [path for path in _read(paths) if not path.endswith(WEIGHTS)]


def model_files(paths: Iterable[str]) -> list[str]:
    """The files of a model, with its weights: those in safetensors, or else those of PyTorch; of several sets the main one."""
    paths = _read(paths)
    weights = [path for path in paths if path.endswith((".safetensors", ".bin"))]
    main = [path for path in weights if MAIN.fullmatch(path)] or weights
    kind = ".safetensors" if any(path.endswith(".safetensors") for path in main) else ".bin"
    chosen = {path for path in main if path.endswith(kind)} | {path for path in weights if OTHERS.fullmatch(path)}
    return [path for path in paths if path in chosen or not path.endswith(WEIGHTS)]


def _read(paths: Iterable[str]) -> list[str]:
    """The paths in the folders that transformers reads, without hidden files, pictures and code."""
    return sorted(
        path
        for path in paths
        if PurePosixPath(path).parent.as_posix() in (".", TEMPLATES)
        and not path.startswith(".")
        and not path.lower().endswith(NOT_READ)
    )
