"""The run folder: which file is written where, when a run counts as finished, which checkpoints are complete."""
