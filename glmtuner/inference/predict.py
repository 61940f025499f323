"""Answers to the evaluation records of a run, and their scores."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glmtuner.config.groups import Engine
from glmtuner.config.schema import Run
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.distributed import ranks
from glmtuner.families.stop_tokens import stop_ids
from glmtuner.inference.scoring import Scorer
from glmtuner.run_folder.files import read_lines, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import EVALUATIONS, PREDICTIONS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.splits import Datasets


def predict(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    template: Any,
    data: "Datasets",
) -> dict[str, float]:
    """Answers to all evaluation records in predictions.jsonl, and their scores."""
    found = answer_all(run, folder, model, tokenizer, template, data, folder / PREDICTIONS, bar=True)
    return {f"predict_{name}": value for name, value in found.items()}


def answer_all(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    template: Any,
    data: "Datasets",
    path: Path,
    bar: bool = False,
) -> dict[str, float]:
    """Write each answer as it comes, in order, those of an interrupted prediction kept; returns their scores.

    Several ranks share the records, each with a file of its own, and only rank 0's stand in `path` until all are done.
    Ranks that hold a share of the weights each answer every record together, since each needs the others for every token.
    """
    from tqdm import tqdm

    from glmtuner.inference.generate import Decoding, answers

    assert data.evaluation is not None
    rows = data.evaluation
    decoding = Decoding(
        max_new_tokens=run.generation.max_new_tokens or run.data.max_target_length,
        num_beams=run.data.eval_num_beams or 1,
        repetition_penalty=run.generation.repetition_penalty,
        stop_ids=stop_ids(template, tokenizer, run.model.family),
        pad_id=tokenizer.pad_token_id,
    )
    early = folder / EVALUATIONS / f"{path.stem}.early.jsonl"
    others = [folder / EVALUATIONS / f"{path.stem}.rank{rank}.jsonl" for rank in range(1, ranks.world_size())]
    done = ranks.broadcast_from_rank0(lambda: earlier(path, early, others, path.name == PREDICTIONS))
    left = [index for index in range(len(rows)) if index not in done]
    together = run.parallel.sharded and ranks.world_size() > 1
    mine = left if together else left[ranks.rank() :: ranks.world_size()]
    prompts = [rows[index]["prompt_ids"] for index in mine]
    if bar and run.generation.engine is Engine.vllm:
        from glmtuner.inference.vllm import vllm_answers

        produced = vllm_answers(model, prompts, decoding, run.trainer.seed)
    else:
        produced = answers(model, prompts, decoding, batch_size_of(run, model, prompts, decoding.max_new_tokens))
    scorer = Scorer(run.metric, len(rows) if ranks.is_main() else 0)
    written = InOrder(path, early, sorted([*done, *mine])) if ranks.is_main() else Appended(others[ranks.rank() - 1])
    with written as file:
        shown = bar and ranks.is_main() and not run.trainer.disable_tqdm
        lines = (
            line_of(rows[mine[place]], mine[place], tokenizer.decode(tokens, skip_special_tokens=True))
            for place, tokens in tqdm(produced, total=len(mine), desc="predict", disable=not shown)
        )
        for line in chain(done.values() if ranks.is_main() else (), lines):
            file.put(line)
            scorer.put(line["index"], *pair_of(line))
    ranks.barrier()
    return ranks.broadcast_from_rank0(lambda: scored(scorer, path, [early, *others]))


def batch_size_of(run: Run, model: "nn.Module", prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """How many answers are generated at once; see `Generation`. Beams multiply what one takes, so they keep to what was given."""
    from glmtuner.inference.generate import rows_that_fit

    given = run.trainer.per_device_eval_batch_size
    if run.generation.max_batch_size is not None:
        return run.generation.max_batch_size
    if given != TrainerArguments.per_device_eval_batch_size or (run.data.eval_num_beams or 1) > 1 or not prompts:
        return given
    return ranks.broadcast_from_rank0(lambda: rows_that_fit(model, max(map(len, prompts)) + new_tokens))


def line_of(row: Mapping[str, Any], index: int, text: str) -> dict[str, Any]:
    """The record's line; ChatGLM3 begins an answer with a line break."""
    return {"index": index, "prompt": row["prompt"], "label": row["answer"], "predict": text.strip()}


def pair_of(line: Mapping[str, Any]) -> tuple[str, str]:
    """What is scored: the answer and the label."""
    return line["predict"].strip(), line["label"].strip()


def text_of(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


class Appended:
    """A file to which each line is added as it comes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def put(self, line: dict[str, Any]) -> None:
        self.file.write(text_of([line]))
        self.file.flush()


class InOrder(Appended):
    """A file whose lines stand in the order of `indices` at any time; a line that comes early waits in a file of its own."""

    def __init__(self, path: Path, early: Path, indices: Iterable[int]) -> None:
        super().__init__(path)
        self.early = Appended(early)
        self.waiting: dict[int, dict[str, Any]] = {}
        self.next = iter(indices)
        self.wanted = next(self.next, None)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.early.__exit__(*error)

    def put(self, line: dict[str, Any]) -> None:
        self.waiting[line["index"]] = line
        if line["index"] != self.wanted:
            self.early.put(line)
        while self.wanted in self.waiting:
            super().put(self.waiting.pop(self.wanted))
            self.wanted = next(self.next, None)


def earlier(path: Path, early: Path, others: list[Path], kept: bool) -> dict[int, dict[str, Any]]:
    """The answers of an interrupted prediction by index, in order, when they are to be kept.

    They stand in `early` from now on, and the other files are empty or gone.
    """
    folder = early.parent
    folder.mkdir(parents=True, exist_ok=True)
    # it may have had more ranks than this one
    before = [path, early, *others, *folder.glob(f"{path.stem}.rank*.jsonl")]
    found = {line["index"]: line for part in before for line in read_lines(part)} if kept else {}
    done = {index: found[index] for index in sorted(found)}
    write_text(early, text_of(done.values()))
    for part in before:
        if part != early:
            part.unlink(missing_ok=True)
    return done


def scored(scorer: Scorer, path: Path, others: list[Path]) -> dict[str, float]:
    """The scores of all ranks' answers, which stand in order in `path` alone from now on."""
    done = {line["index"]: line for part in (path, *others) for line in read_lines(part)}
    ordered = [done[index] for index in sorted(done)]
    write_text(path, text_of(ordered))
    for part in others:
        part.unlink(missing_ok=True)
    return scorer.scores({line["index"]: pair_of(line) for line in ordered})
