"""The Hugging Face Trainer, its callbacks and samplers."""
