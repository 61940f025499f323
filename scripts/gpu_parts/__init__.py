"""What scripts/gpu_check.py runs on a GPU, one module a part, each in a process of its own.

A part's `run(check)` measures and records; its `prepare(check)`, where it has one, is done beforehand while other parts run,
and takes no GPU.
"""
