"""What differs between runs, between sweeps, and between a run and its repetition; from their folders.

torch is imported only where weights are compared, and by a run that is repeated.
"""
