"""Chat templates, and the encoding of text as token ids."""
