"""Triton's interpreter computes Liger's kernels on the CPU: their own source, line by line in numpy, and no GPU.

It lacks two things that the compiler has, and they are given to it here: a float that a kernel is called with is a number of
the kernel's, and CUDA's reciprocal square root. Run by `make test-liger`, which installs Triton and liger-kernel.
"""

import importlib
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_converted = interpreter._implicit_cvt


def _with_floats(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return _converted(value)


interpreter._implicit_cvt = _with_floats
for _name in ("rms_norm", "layer_norm"):
    importlib.import_module(f"liger_kernel.ops.{_name}").rsqrt = lambda value: tl.rsqrt(value)
