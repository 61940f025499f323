"""Answers to the evaluation records of a run, and their scores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner import ranks
from glmtuner.assemble import stop_ids
from glmtuner.config.schema import Run
from glmtuner.run_folder import EVALUATIONS, PREDICTIONS, RunFolder, read_lines, write_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.splits import Datasets
    from glmtuner.trainer import GlmTrainer


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
    """Write each answer as it comes, those of an interrupted prediction kept; then all in order; returns their scores.

    Several ranks share the records, each with a file of its own until all are done. Ranks that hold a share of the weights
    each answer every record together, since each needs the others for every token.
    """
    from tqdm import tqdm

    from glmtuner.generate import Decoding, answers

    assert data.evaluation is not None
    rows = data.evaluation
    decoding = Decoding(
        max_new_tokens=run.generation.max_new_tokens or run.data.max_target_length,
        num_beams=run.data.eval_num_beams or 1,
        repetition_penalty=run.generation.repetition_penalty,
        stop_ids=stop_ids(template, tokenizer, run.model.family),
        pad_id=tokenizer.pad_token_id,
    )
    parts = [path, *(folder / EVALUATIONS / f"{path.stem}.rank{rank}.jsonl" for rank in range(1, ranks.world_size()))]
    done = ranks.agreed(lambda: earlier(parts, path.name == PREDICTIONS))
    left = [index for index in range(len(rows)) if index not in done]
    together = run.parallel.sharded and ranks.world_size() > 1
    mine = left if together else left[ranks.rank() :: ranks.world_size()]
    prompts = [rows[index]["prompt_ids"] for index in mine]
    with parts[ranks.rank()].open("w", encoding="utf-8") as file:
        for line in done.values() if ranks.is_main() else ():
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        produced = answers(model, prompts, decoding, run.trainer.per_device_eval_batch_size)
        shown = bar and ranks.is_main() and not run.trainer.disable_tqdm
        for place, tokens in tqdm(produced, total=len(mine), desc="predict", disable=not shown):
            index = mine[place]
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()  # ChatGLM3 begins with a line break
            line = {"index": index, "prompt": rows[index]["prompt"], "label": rows[index]["answer"], "predict": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    ranks.meet()
    return ranks.agreed(lambda: scored(run, parts))


def earlier(parts: list[Path], kept: bool) -> dict[int, dict[str, Any]]:
    """The answers in the files of the ranks by index, when they are to be kept; the files of the other ranks go."""
    done = {line["index"]: line for part in parts for line in read_lines(part)} if kept else {}
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
    for part in parts[1:]:
        part.unlink(missing_ok=True)
    return done


def scored(run: Run, parts: list[Path]) -> dict[str, float]:
    """The scores of all ranks' answers, which stand in order in the first file from now on."""
    done = {line["index"]: line for part in parts for line in read_lines(part)}
    ordered = [done[index] for index in sorted(done)]
    write_text(parts[0], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))
    for part in parts[1:]:
        part.unlink(missing_ok=True)
    return run.metric.scores([line["predict"].strip() for line in ordered], [line["label"].strip() for line in ordered])


def score_pairs(run: Run, folder: RunFolder, trainer: "GlmTrainer", data: "Datasets") -> dict[str, float]:
    """Write prompt, answers and their scores of every pair to predictions.jsonl; returns the share ranked right, and the margin."""
    import torch

    assert data.evaluation is not None
    trainer.model.eval()
    rows, size, lines = data.evaluation, run.trainer.per_device_eval_batch_size, []
    for start in range(0, len(rows), size):
        batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            scores = trainer.objective.scores(trainer._prepare_inputs(trainer.data_collator(batch))).tolist()
        for place, (row, chosen, rejected) in enumerate(
            zip(batch, scores[: len(batch)], scores[len(batch) :], strict=True)
        ):
            line = {
                "index": start + place,
                "prompt": row["prompt"],
                "chosen": row["answer"],
                "rejected": row["rejected"],
            }
            lines.append({**line, "chosen_score": chosen, "rejected_score": rejected})
    if ranks.is_main():
        write_text(folder / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    margins = [line["chosen_score"] - line["rejected_score"] for line in lines]
    right = sum(margin > 0 for margin in margins)
    return {"predict_accuracy": right / len(margins), "predict_margin": sum(margins) / len(margins)}
