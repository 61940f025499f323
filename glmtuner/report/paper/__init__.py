"""A sweep, or a run, as LaTeX: tables, vector pictures, the experimental set-up in words, and the references that it needs."""

from glmtuner.report.paper.write import write_paper

__all__ = ["write_paper"]
