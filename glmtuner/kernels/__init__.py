"""Faster computations of the same loss and gradients, and the choice of those that a run uses."""
