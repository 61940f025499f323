"""The names of what lies in a run folder."""

CONFIG, OVERRIDES, PROVENANCE, HISTORY, METRICS = (
    "config.yaml",
    "overrides.txt",
    "provenance.json",
    "history.jsonl",
    "metrics.json",
)
PREDICTIONS, REPORT, LOSS_PICTURE, TEMPLATE = "predictions.jsonl", "report.md", "loss.png", "template.jinja"
REPORT_PAGE, SWEEP = "report.html", "sweep.json"  # sweep.json is in a sweep's folder: what was typed
CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL = "checkpoints", "evaluations", "adapter", "model"
FAILED, OUTPUT = "failed.json", "output.log"  # why the last attempt ended; what a job of a sweep printed
LOSSES = "losses.jsonl"  # of each evaluation record: `index`, `loss` (nats, summed over the answer), `tokens`; or what a stage measures
LOCK = ".lock"  # held by the process that runs the run
TRACKERS = ("wandb", "tensorboard")
OURS = (
    CONFIG, OVERRIDES, PROVENANCE, HISTORY, METRICS, PREDICTIONS, REPORT, REPORT_PAGE, LOSS_PICTURE, TEMPLATE,
    CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL, FAILED, OUTPUT, LOSSES, *TRACKERS,
)  # fmt: skip
MARKER = "complete.json"  # written last into a checkpoint: its files and their sizes
