"""The names of the files and folders in a run folder."""

CONFIG, OVERRIDES, PROVENANCE, HISTORY, METRICS = (
    "config.yaml",
    "overrides.txt",
    "provenance.json",
    "history.jsonl",
    "metrics.json",
)
PREDICTIONS, REPORT, LOSS_PLOT, TEMPLATE = "predictions.jsonl", "report.md", "loss.png", "template.jinja"
REPORT_PAGE, SWEEP = "report.html", "sweep.json"  # sweep.json is in the folder of a sweep: its command lines
CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL = "checkpoints", "evaluations", "adapter", "model"
KEPT = "kept"  # the trained weights of a run that could not be saved as adapter/ or model/
FAILED, OUTPUT = "failed.json", "output.log"  # why the last attempt failed; the output of a sweep job
# One line per evaluation record: `index`, `loss` (in nats, summed over the answer), `tokens`; or the metrics of a stage.
LOSSES = "losses.jsonl"
REFERENCE = "reference.safetensors"  # log-probabilities of all records, of stage.precompute_reference
SAMPLED = "sampled.jsonl"  # of each step of stage=grpo a prompt, and a line for each answer to it, with its rewards
LOCK = ".lock"  # locked by the process that executes the run
RECEIPT = "export.json"  # in the folder of an exported model, written last
TRACKERS = ("wandb", "tensorboard")
RUN_ENTRIES = (  # everything that a run writes into its folder, except for LOCK
    CONFIG, OVERRIDES, PROVENANCE, HISTORY, METRICS, PREDICTIONS, REPORT, REPORT_PAGE, LOSS_PLOT, TEMPLATE,
    CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL, KEPT, FAILED, OUTPUT, LOSSES, REFERENCE, *TRACKERS,
)  # fmt: skip
PARTIAL = ".partial"  # a file or folder is written as `.<name>.partial` and renamed
MARKER = "complete.json"  # the last file written into a checkpoint: its files and their sizes
