"""hydra/sweeper=race: every combination starts, and at each rung the jobs that are behind are dropped.

A rung is a barrier: its jobs are handed to the launcher together, each as soon as a place is free, and what is decided is decided of
all of them at once. So the decisions depend on the evaluations alone, not on which job was quick, and a race that is killed anywhere
decides the same again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from glmtuner.config.objective import less_is_better
from glmtuner.console import say, table
from glmtuner.distributed.pause import Pause, measure_of
from glmtuner.errors import CheckpointError, ConfigError, TrainingError, did_you_mean
from glmtuner.report.race import (
    BEST,
    DROPPED,
    FINISHED,
    GOES_ON,
    OUT_OF_MEMORY,
    read_rung,
    rung_file,
    rung_table,
    rung_title,
)
from glmtuner.report.record_scores import RecordScores, record_scores
from glmtuner.run_folder.files import read_object, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, PAUSE, PAUSES, PREDICTIONS, RACE
from glmtuner.run_folder.redaction import flatten
from glmtuner.sweep.race_options import KEY, RaceOptions
from glmtuner.sweep.rungs import has_reached, pause_words, wait_for_files


@dataclass(frozen=True)
class RaceJob:
    """A job of the grid: its overrides for the launcher, and its folder."""

    overrides: list[str]
    folder: RunFolder

    @property
    def name(self) -> str:
        return self.folder.path.name


@dataclass(frozen=True)
class Measured:
    """A job's evaluation at a rung, or at its end if that came first."""

    step: int
    max_steps: int
    digest: str | None  # of the evaluation records; None at the end of a run, which does not write it
    scores: RecordScores


class RaceSweeper(Sweeper):
    """Hydra's plugin; the keys are those of conf/hydra/sweeper/race.yaml."""

    def __init__(self, params: Any = None, **options: Any) -> None:
        # Hydra reloads the module
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        self.grid = BasicSweeper(max_batch_size=None, params=params)
        self.num_launched = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.grid.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.context, self.whole_config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        jobs = self.jobs(arguments)
        if len(jobs) < 2:
            raise ConfigError(
                "hydra/sweeper=race: there is nothing to race against; type two or more values, as in trainer.learning_rate=1e-3,5e-4"
            )
        options = RaceOptions.of(self.whole_config.hydra.sweeper)
        objective = OmegaConf.select(self.whole_config, "objective") or "eval_loss"
        Race(Path(str(self.whole_config.hydra.sweep.dir)), options, jobs, str(objective), self).run()

    def jobs(self, arguments: list[str]) -> list[RaceJob]:
        """The jobs of the grid, in the order of Hydra's basic sweeper; composing them finds mistakes before one starts."""
        loader = self.context.config_loader
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(
            [*self.grid._parse_config(), *arguments]
        )
        (combinations,) = self.grid.split_arguments(overrides, None)
        jobs = []
        for number, combination in enumerate(combinations):
            config = loader.load_sweep_config(self.whole_config, list(combination))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
            jobs.append(RaceJob(list(combination), RunFolder(folder)))
        return jobs

    def launch(self, jobs: Sequence[RaceJob], pause: Pause | None) -> None:
        """Run the jobs to the pause, or to their end, by the launcher of the sweep; their folders tell what came of them."""
        if not jobs:
            return
        assert self.grid.launcher is not None
        results = self.grid.launcher.launch(
            [[*job.overrides, *pause_words(pause)] for job in jobs], initial_job_idx=self.num_launched
        )
        self.num_launched += len(jobs)
        for result in results:
            _ = result.return_value  # raises what is not a job's own failure


class Race:
    """The course of a race; its decisions are in `race/` of the sweep's folder, one file a rung."""

    def __init__(
        self, root: Path, options: RaceOptions, jobs: Sequence[RaceJob], objective: str, sweeper: RaceSweeper
    ) -> None:
        self.root, self.options, self.jobs, self.sweeper = root, options, jobs, sweeper
        self.measure = measure_of(objective)
        self.by_name = {job.name: job for job in jobs}
        self.recalled = [self._named(name) for name in options.recall]

    def _named(self, name: str) -> RaceJob:
        """The job of this name, which may be without the hash at its end."""
        slugs = [job.name.rpartition("_")[0] for job in self.jobs]
        same = [job for job, slug in zip(self.jobs, slugs, strict=True) if name in (job.name, slug)]
        if len(same) != 1:
            names = [slug if slugs.count(slug) == 1 else job.name for job, slug in zip(self.jobs, slugs, strict=True)]
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise ConfigError(
                f"{KEY}.recall=[{name}]: {len(same) or 'no'} jobs of the sweep have this name"
                f"{did_you_mean(name, names, f'legal: {listed}')}"
            )
        return same[0]

    def run(self) -> None:
        """Train the grid: rung by rung those that go on, the last ones to their end, and those that are called back."""
        racing = [*self.jobs]
        for number, pause in enumerate(self.options.rungs, 1):
            if len(racing) <= self.options.keep:
                break  # nobody can be dropped
            path = rung_file(self.root, number)
            if path.is_file():
                decision = self._same(path, racing)
            else:
                self.sweeper.launch([job for job in racing if not has_reached(job.folder, pause)], pause)
                found = self._decide(number, pause, racing)
                if found is None:
                    return
                decision = found
                write_json(path, decision)
            header, rows = rung_table(decision)
            table(rung_title(decision), header, rows, lines=False)
            racing = [
                self.by_name[line["job"]] for line in decision["jobs"] if line["state"] in (BEST, GOES_ON, FINISHED)
            ]
        self.sweeper.launch([job for job in racing if not job.folder.is_finished], None)
        called = [job for job in self.recalled if job not in racing]
        for job in self.recalled:
            if job in racing:
                say(f"{KEY}.recall: {job.name} was not dropped, so there is nothing to call back")
        for job in called:
            if not job.folder.is_finished:
                (job.folder / FAILED).unlink(missing_ok=True)
        self.sweeper.launch([job for job in called if not job.folder.is_finished], None)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a decision depends on, besides the jobs and their evaluations."""
        options = self.options
        return {
            "rungs": [pause.text for pause in options.rungs], "rule": options.rule, "alpha": options.alpha, "keep": options.keep,
            "reduction_factor": options.reduction_factor, "metric": self.measure,
        }  # fmt: skip

    def _same(self, path: Path, racing: Sequence[RaceJob]) -> dict[str, Any]:
        """The decision in the file; raises CheckpointError if it is damaged, ConfigError if it is of another race."""
        decision = read_rung(path)
        advice = f"type another name=… for another race, or remove {self.root / RACE} to decide again"
        for key, value in self._identity().items():
            if decision.get(key) != value:
                raise ConfigError(
                    f"{path} was decided with {KEY}.{key}={decision.get(key)}, and this command has {value}; {advice}"
                    if key != "metric"
                    else f"{path} was decided by {decision.get(key)}, and the objective of this command is {value}; {advice}"
                )
        known, names = [line["job"] for line in decision["jobs"]], [job.name for job in racing]
        if sorted(known) != sorted(names):
            new, gone = sorted({*names} - {*known}), sorted({*known} - {*names})
            what = f"{new[0]} is new" if new else f"{gone[0]} is missing"
            raise ConfigError(f"{path} was decided for other jobs than those of this command ({what}); {advice}")
        return decision

    def _decide(self, number: int, pause: Pause, racing: Sequence[RaceJob]) -> dict[str, Any] | None:
        """The decision of a rung, with its evidence; None, with a sentence, if a job has neither reached it nor failed."""
        wait_for_files([job.folder for job in racing], pause, self.sweeper.whole_config.hydra.launcher)
        failures = {job.name: job.folder.failure() for job in racing if not has_reached(job.folder, pause)}
        if missing := [name for name, failure in failures.items() if failure is None]:
            say(
                f"rung {number} is not decided: {len(missing)} of {len(racing)} jobs have not reached it, such as {missing[0]}; the "
                "same command goes on"
            )
            return None
        present = [job for job in racing if job.name not in failures]
        if not present:
            return None  # each job has said why; the same command tries them again
        now = self._evaluations(present, pause, number)
        before = self._evaluations(present, self.options.rungs[number - 2], number - 1) if number > 1 else None
        lines = self._lines(present, now, before)
        for name, failure in failures.items():
            assert failure is not None
            state = OUT_OF_MEMORY if failure["kind"] == "infeasible" else "failed"
            lines[name] = {"job": name, "state": state, "reason": failure["reason"]}
        return {
            "rung": number, "of": len(self.options.rungs), "pause": pause.text, **self._identity(),
            "records": len(now[0].scores), "jobs": [lines[job.name] for job in racing],
        }  # fmt: skip

    def _lines(
        self, jobs: Sequence[RaceJob], now: Sequence[Measured], before: Sequence[Measured] | None
    ) -> dict[str, dict[str, Any]]:
        """What the rule says of each job, with the numbers, by the name of its folder."""
        from glmtuner.sweep.race_rules import Evaluation, Rule, decide

        options, records = self.options, list(now[0].scores)
        sign = 1.0 if less_is_better(self.measure) else -1.0

        def evaluations(measured: Sequence[Measured]) -> list[Evaluation]:
            scores = [[each.scores[record] for record in records] for each in measured]
            return [
                Evaluation.of(job.name, each.step, each.max_steps, [(sign * total, weight) for total, weight in pairs])
                for job, each, pairs in zip(jobs, measured, scores, strict=True)
            ]

        rule = Rule.of_race(options.rule, options.alpha, options.keep, options.reduction_factor, len(options.rungs))
        entrants = evaluations(now)
        verdicts = decide(rule, entrants, evaluations(before) if before else None)
        order = sorted(range(len(verdicts)), key=lambda index: verdicts[index].value)
        lines = {}
        for index, (entrant, verdict) in enumerate(zip(entrants, verdicts, strict=True)):
            state = DROPPED if verdict.dropped else BEST if index == order[0] else GOES_ON
            lines[verdict.job] = {
                "job": verdict.job, "state": FINISHED if entrant.is_finished else state, "place": order.index(index) + 1,
                "step": entrant.step, "max_steps": entrant.max_steps, "value": sign * verdict.value, **verdict.evidence(),
            }  # fmt: skip
        return lines

    def _evaluations(self, jobs: Sequence[RaceJob], pause: Pause, number: int) -> list[Measured]:
        """The jobs' evaluations at a rung; raises TrainingError unless all are of the same records."""
        found = [self._measured(job, pause) for job in jobs]
        first = found[0]
        for job, each in zip(jobs, found, strict=True):
            other_rows = None not in (first.digest, each.digest) and first.digest != each.digest
            if each.scores.keys() != first.scores.keys() or (other_rows and not self._is_generated(job, pause)):
                raise TrainingError(
                    f"rung {number} cannot be decided: {job.name} was evaluated on other records, or other tokens of them, than "
                    f"{jobs[0].name}; run a race for each tokenizer, template and evaluation set, or compare answers: "
                    "objective=rouge-l"
                )
        if len(first.scores) < 2:
            raise TrainingError(
                f"rung {number} cannot be decided: {self.measure} was measured on {len(first.scores)} records, and an interval takes "
                "two or more; type data.eval_dataset=… with more records"
            )
        return found

    def _is_generated(self, job: RaceJob, pause: Pause) -> bool:
        return (job.folder / PAUSES / pause.text / PREDICTIONS).is_file()

    def _measured(self, job: RaceJob, pause: Pause) -> Measured:
        place = job.folder / PAUSES / pause.text
        values = flatten(OmegaConf.to_container(job.folder.config(), enum_to_str=True))
        if (place / PAUSE).is_file():
            about = read_object(place / PAUSE)
            step, max_steps, digest = about.get("step"), about.get("max_steps"), about.get("records")
            if not isinstance(step, int) or not isinstance(max_steps, int) or not isinstance(digest, str):
                raise CheckpointError(
                    f"{place / PAUSE} is damaged; remove {place}: the same command evaluates the job again"
                )
            if step != pause.step(max_steps):
                raise TrainingError(
                    f"{place}: the job was evaluated after step {step}, past the rung at step {pause.step(max_steps)}, since its "
                    f"training went on from a later checkpoint; remove {job.folder.path} to train it again, or type later "
                    f"{KEY}.rungs"
                )
            source = RunFolder(place)
        else:
            step = max_steps = max((int(line["step"]) for line in job.folder.history()), default=1)
            digest, source = None, job.folder
        names = (f"eval_{self.measure}", f"predict_{self.measure}")
        scores = record_scores(source, values, names)
        found = next((scores[name] for name in names if name in scores), {})
        return Measured(step, max_steps, digest, found)
