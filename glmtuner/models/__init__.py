"""ChatGLM's configs, models and tokenizers, written here because transformers has none of their own."""
