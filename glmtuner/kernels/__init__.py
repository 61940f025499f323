"""Faster ways to the same numbers, and which of them a run takes."""
