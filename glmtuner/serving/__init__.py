"""A finished run behind the OpenAI chat-completions API: an engine that batches, an HTTP layer, a page to chat on."""
