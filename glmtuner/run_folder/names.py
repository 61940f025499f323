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
PAUSES, PAUSE = "pauses", "pause.json"  # the evaluations of a paused training, each in a folder by the pause
KEPT = "kept"  # the trained weights of a run that could not be saved as adapter/ or model/
FAILED, OUTPUT = "failed.json", "output.log"  # why the last attempt failed; the output of a sweep job
# One line per evaluation record: `index`, `loss` (in nats, summed over the answer), `tokens`; or the metrics of a stage.
LOSSES = "losses.jsonl"
REFERENCE = "reference.safetensors"  # log-probabilities of all records, of stage.precompute_reference
BENCHMARKS = "benchmarks"  # of each task a file of its records' scores, and scores.json with those of all
SAMPLED = "sampled.jsonl"  # of each step of stage=grpo a prompt, and a line for each answer to it, with its rewards
RECORDS = "records"  # of each dataset a hash of 8 bytes per record, in their order
PROGRESS = "progress.json"  # of a training: how far it is, and since when; removed once the run is finished
RACE = "race"  # in the folder of a sweep: the decisions of hydra/sweeper=race, a file a rung
PRUNED = "pruned.json"  # of a trial that hydra/sweeper=optuna has stopped at a rung, and why
TIMINGS = "timings.jsonl"  # a line for each line of HISTORY: when it was written, and how fast the training is
PLAN = "plan.json"  # the table of the run that is printed before its training
SPENT = ".spent"  # the hours of each attempt, of a sweep in the sweep's folder
LOCK = ".lock"  # locked by the process that executes the run
RECEIPT = "export.json"  # in the folder of an exported model, written last
TRACKERS = ("wandb", "tensorboard", "mlflow", "swanlab", "trackio", "comet")
RUN_ENTRIES = (  # everything that a run writes into its folder, except for LOCK
    CONFIG, OVERRIDES, PROVENANCE, HISTORY, METRICS, PREDICTIONS, REPORT, REPORT_PAGE, LOSS_PLOT, TEMPLATE,
    CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL, KEPT, FAILED, OUTPUT, LOSSES, REFERENCE, RECORDS, PROGRESS,
    PAUSES, PRUNED, BENCHMARKS, SAMPLED, TIMINGS, PLAN, *TRACKERS,
)  # fmt: skip
SHARDS = "shards"  # in a checkpoint: what its ranks wrote, each its own part
PARTIAL = ".partial"  # a file or folder is written as `.<name>.partial` and renamed
MARKER = "complete.json"  # the last file written into a checkpoint: its files and their sizes
