"""The run folder: what is written where, when a run counts as finished, which checkpoints are complete."""
