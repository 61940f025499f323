"""The ranks of a run, and its preemption by a signal."""
