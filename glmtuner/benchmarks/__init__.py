"""Benchmarks: tasks of lm-evaluation-harness, asked of the model that a run has loaded."""
