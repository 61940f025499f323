"""Answers: generation, continuous batching, prediction, scoring, conversation."""
