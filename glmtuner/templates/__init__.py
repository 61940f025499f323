"""Chat templates, and from text to token ids."""
