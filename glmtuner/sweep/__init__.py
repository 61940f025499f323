"""Sweeps: their jobs, their launchers, their folders."""
