"""The memory of a training, estimated before anything is loaded."""
