"""The command line: overrides and verbs in, exit code out."""
