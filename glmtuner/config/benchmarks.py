"""Which benchmarks score the model, and how they are asked; `benchmark=ceval,mmlu` is short for `benchmark.tasks=ceval,mmlu`."""

from dataclasses import dataclass, field

from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError

GROUP, TASKS = "benchmark", "benchmark.tasks"
FOLDER_VARIABLE = "GLMTUNER_BENCHMARKS"
# The names that benchmarks are known by, where lm-evaluation-harness has another.
KNOWN_AS = {"ceval": "ceval-valid"}


@dataclass(kw_only=True)
class Benchmark:
    """Tasks of lm-evaluation-harness that the model is scored on when it is trained and evaluated, from local copies of their sets.

    `num_fewshot` examples stand before a question, by default as many as the task says; of each task the first `limit` records
    are asked. With `chat_template` the questions are turns of the run's template, else plain text. `include_path` is a folder of
    the user's own tasks, and `data_dir` has the sets, as has $GLMTUNER_BENCHMARKS.
    """

    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    data_dir: str | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        wrong = list(
            range_errors(
                GROUP,
                self,
                (
                    ("num_fewshot", self.num_fewshot is None or self.num_fewshot >= 0, "0 or more, or null"),
                    ("limit", self.limit is None or self.limit >= 1, "1 or more records of each task, or null for all"),
                ),
            )
        )
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        wrong += [f"{GROUP}={','.join(self.tasks)}: {name} is named twice" for name in twice]
        set_keys = [
            name
            for name in ("num_fewshot", "limit", "chat_template", "data_dir", "include_path")
            if getattr(self, name)
        ]
        if set_keys and not self.tasks:
            wrong.append(
                f"{GROUP}.{set_keys[0]}={getattr(self, set_keys[0])} without a benchmark: type {GROUP}=ceval, say, too"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))
