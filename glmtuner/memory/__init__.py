"""Estimates the memory of a training before anything is loaded."""
