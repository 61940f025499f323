"""glmtuner: fine-tunes ChatGLM, GLM and other causal language models from composed YAML.

Nothing heavy is imported here; `import glmtuner.models` registers ChatGLM with the Auto classes.
"""

__version__ = "0.1.0"
