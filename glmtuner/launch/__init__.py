"""One composed run, from its configuration to its folder."""
