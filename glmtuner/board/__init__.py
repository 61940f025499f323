"""`board`: a page over a folder of runs and sweeps, live and from the files alone; runs are started and talked with from it."""
