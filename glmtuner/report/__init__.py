"""Reports on runs and sweeps, from their folders alone: in the terminal, as Markdown, CSV, plots and an HTML page.

torch is never imported here.
"""

from glmtuner.report.plots import write_loss_plot
from glmtuner.report.run import show_results, show_run, write_run_markdown
from glmtuner.report.sweep import write_report

__all__ = ["show_results", "show_run", "write_loss_plot", "write_report", "write_run_markdown"]
