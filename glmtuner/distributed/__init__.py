"""Several processes of one run, and being told to stop."""
