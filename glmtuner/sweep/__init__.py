"""Sweeps: their jobs, Hydra launchers, folders and the command that runs them."""
