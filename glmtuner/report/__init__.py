"""What came out of runs and sweeps, from their folders alone: on the terminal, as text, pictures and a page.

torch is never imported here.
"""

from glmtuner.report.pictures import draw_loss
from glmtuner.report.run import show, show_results, write_run
from glmtuner.report.sweep import report

__all__ = ["draw_loss", "report", "show", "show_results", "write_run"]
