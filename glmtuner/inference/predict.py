"""Generates and scores the answers to a run's evaluation records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glmtuner.config.groups import Engine, Metric
from glmtuner.config.schema import Run
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.console import say, tracked
from glmtuner.distributed import ranks
from glmtuner.errors import CheckpointError
from glmtuner.families.stop_tokens import stop_ids
from glmtuner.inference.answer import opens_thought
from glmtuner.inference.context import RunContext
from glmtuner.inference.reference import answer_text, opens_reference, reference_of, split_answer
from glmtuner.inference.scoring import Scorer
from glmtuner.run_folder.files import read_lines, strict_json, write_text
from glmtuner.run_folder.names import EVALUATIONS, PREDICTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predict(context: RunContext) -> dict[str, float]:
    """Write the answers to all evaluation records to predictions.jsonl; returns their scores."""
    scores = answer_all(context, context.folder / PREDICTIONS, is_prediction=True)
    return {f"predict_{name}": value for name, value in scores.items()}


def answer_all(context: RunContext, path: Path, is_prediction: bool = False) -> dict[str, float]:
    """Write the answers to `path` in order, each as soon as possible; returns their scores.

    The answers of an interrupted prediction are reused. Records are divided among the ranks, and each rank writes its own
    file, which are merged into `path` at the end. A prediction, in contrast to an evaluation during training, shows its
    progress and may use another engine.
    """

    from glmtuner.inference.generate import Decoding, answers

    run, model, folder = context.run, context.model, context.folder
    assert context.data.evaluation is not None
    rows = context.data.evaluation
    decoding = Decoding(
        max_new_tokens=run.generation.max_new_tokens or run.data.max_target_length,
        num_beams=run.data.eval_num_beams or 1,
        repetition_penalty=run.generation.repetition_penalty,
        stop_ids=stop_ids(context.template, context.tokenizer, context.family.name, model),
        pad_id=context.tokenizer.pad_token_id,
    )
    early = folder / EVALUATIONS / f"{path.stem}.early.jsonl"
    others = [folder / EVALUATIONS / f"{path.stem}.rank{rank}.jsonl" for rank in range(1, ranks.world_size())]
    tokenizer, max_target_length = context.tokenizer, run.data.max_target_length
    syntax = context.template.syntax(tokenizer)

    def line(index: int, answer: str) -> dict[str, Any]:
        row = rows[index]
        reference = reference_of(row, tokenizer, decoding.stop_ids, max_target_length, syntax)
        opens = opens_thought(tokenizer, row["prompt_ids"]), opens_reference(row, tokenizer)
        return line_of(row, index, reference, answer, opens)

    def restored(stored: dict[str, Any]) -> dict[str, Any] | None:
        index, answer = stored["index"], stored.get("predict")
        if not isinstance(answer, str) or index >= len(rows):
            return None
        expected = line(index, answer)
        return expected if all(stored.get(name) == expected[name] for name in ("prompt", "label")) else None

    done = ranks.broadcast_from_rank0(lambda: recover_answers(path, early, others, path.name == PREDICTIONS, restored))
    remaining = [index for index in range(len(rows)) if index not in done]
    indices = remaining[ranks.rank() :: ranks.world_size()]
    prompts = [rows[index]["prompt_ids"] for index in indices]
    if is_prediction and run.generation.engine is Engine.vllm:
        from glmtuner.inference.vllm import vllm_answers

        produced = vllm_answers(model, prompts, decoding, run.trainer.seed)
    else:
        produced = answers(model, prompts, decoding, batch_size_of(run, model, prompts, decoding.max_new_tokens))
    scorer = Scorer(run.metric, len(rows) if ranks.is_main() else 0)
    output = (
        OrderedFile(path, early, sorted([*done, *indices])) if ranks.is_main() else LineFile(others[ranks.rank() - 1])
    )
    with output as file:
        shows_progress = is_prediction and ranks.is_main() and not run.trainer.disable_tqdm
        answered = tracked(produced, len(indices), "predict", shown=shows_progress)
        lines = (line(indices[place], answer_text(tokenizer, tokens, syntax)) for place, tokens in answered)
        for each in chain(done.values() if ranks.is_main() else (), lines):
            file.put(each)
            scorer.put(each["index"], *pair_of(each, run.metric))
    ranks.barrier()
    parts = context.data.evaluated_parts()
    return ranks.broadcast_from_rank0(lambda: merge_and_score(scorer, path, [early, *others], len(rows), parts))


def batch_size_of(run: Run, model: "PreTrainedModel", prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """How many answers are generated at once; see `Generation`. With beams, per_device_eval_batch_size: they multiply the memory."""
    from glmtuner.inference.generate import rows_that_fit

    configured = run.trainer.per_device_eval_batch_size
    if run.generation.max_batch_size is not None:
        return run.generation.max_batch_size
    if configured != TrainerArguments.per_device_eval_batch_size or (run.data.eval_num_beams or 1) > 1:
        return configured
    return ranks.broadcast_from_rank0(
        lambda: rows_that_fit(model, max(map(len, prompts)) + new_tokens) if prompts else configured
    )


def line_of(
    row: Mapping[str, Any], index: int, reference: str, answer: str, opens_thought: tuple[bool, bool] = (False, False)
) -> dict[str, Any]:
    """The record's line in predictions.jsonl: `label` is the record's own text, `reference` what the answer is scored against.

    Where the answer or its reference has a thought, the line also has the `reasoning` of the answer and both texts without
    it. `opens_thought`: whether the prompt of the answer, and that of the reference, open one.
    """
    line = {
        "index": index, "prompt": row["prompt"], "label": row["answer"], "reference": reference, "predict": answer,
    }  # fmt: skip
    reasoning, rest = split_answer(answer, opens_thought[0])
    _, reference_rest = split_answer(reference, opens_thought[1])
    if (rest, reference_rest) != (answer.strip(), reference.strip()):
        line |= {"reasoning": reasoning, "answer": rest, "reference_answer": reference_rest}
    return line


def pair_of(line: Mapping[str, Any], metric: Metric) -> tuple[str, str]:
    """The answer and its reference, as they are scored by the metric."""
    answer, reference = line["predict"], line["reference"]
    if metric.without_reasoning:
        answer, reference = line.get("answer", answer), line.get("reference_answer", reference)
    return answer.strip(), reference.strip()


def text_of(lines: Iterable[Mapping[str, Any]]) -> str:
    """The lines in JSON Lines format."""
    return "".join(strict_json(line) + "\n" for line in lines)


class LineFile:
    """A JSON Lines file that lines are appended to; each is flushed at once."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def put(self, line: dict[str, Any]) -> None:
        self.file.write(text_of([line]))
        self.file.flush()


class OrderedFile(LineFile):
    """A file with its lines in the order of `indices` at any time; lines that are ahead of their turn are buffered in `early`."""

    def __init__(self, path: Path, early: Path, indices: Iterable[int]) -> None:
        super().__init__(path)
        self.early = LineFile(early)
        self.waiting: dict[int, dict[str, Any]] = {}
        self.following = iter(indices)
        self.next_index = next(self.following, None)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.early.__exit__(*error)

    def put(self, line: dict[str, Any]) -> None:
        self.waiting[line["index"]] = line
        if line["index"] != self.next_index:
            self.early.put(line)
        while self.next_index in self.waiting:
            super().put(self.waiting.pop(self.next_index))
            self.next_index = next(self.following, None)


def recover_answers(
    path: Path,
    early: Path,
    others: list[Path],
    kept: bool,
    restored: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda line: line,
) -> dict[int, dict[str, Any]]:
    """The answers of an interrupted prediction by index, in order; none unless `kept`.

    `restored` returns the line to keep for a line of the files; None if it is not an answer to one of today's records. They are
    moved to `early`, and the other files are removed.
    """
    folder = early.parent
    folder.mkdir(parents=True, exist_ok=True)
    # the interrupted prediction may have had more ranks
    parts = [path, early, *others, *folder.glob(f"{path.stem}.rank*.jsonl")]
    lines = [line for part in parts for line in read_lines(part)] if kept else []
    candidates = {line["index"]: restored(line) for line in lines if is_index(line.get("index"))}
    done = {index: line for index in sorted(candidates) if (line := candidates[index]) is not None}
    num_dropped = len(candidates) - len(done) + sum(not is_index(line.get("index")) for line in lines)
    if num_dropped:
        say(
            f"{path}: lines that are not answers to the records as they are now, which are answered again: {num_dropped}"
        )
    write_text(early, text_of(done.values()))
    for part in parts:
        if part != early:
            part.unlink(missing_ok=True)
    return done


def is_index(value: object) -> bool:
    """Whether the value can be the index of a record."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def merge_and_score(
    scorer: Scorer, path: Path, others: list[Path], records: int, parts: Mapping[str, slice]
) -> dict[str, float]:
    """Merge the answers of all ranks into `path`, in order, and remove the other files; returns the scores.

    `parts` are the words for several datasets, and where their records are.

    Raises CheckpointError, and removes nothing, unless there is one answer for each of the `records`.
    """
    done = {line["index"]: line for part in (*others, path) for line in read_lines(part)}
    if done.keys() != set(range(records)):
        missing = sorted(set(range(records)) - done.keys())
        raise CheckpointError(
            f"{path}: {len(done)} answers for {records} records (record {missing[0] if missing else max(done)} is the first that "
            "does not fit); run the same command again, or with trainer.overwrite_output_dir=true"
        )
    ordered = [done[index] for index in sorted(done)]
    write_text(path, text_of(ordered))
    for part in others:
        part.unlink(missing_ok=True)
    return scorer.scores({line["index"]: pair_of(line, scorer.metric) for line in ordered}, parts)
