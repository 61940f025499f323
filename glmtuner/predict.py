"""Answers to the evaluation records of a run, and their scores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.assemble import stop_ids
from glmtuner.config.schema import Run
from glmtuner.run_folder import PREDICTIONS, RunFolder, read_lines, write_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from glmtuner.stages.sft import Datasets


def predict(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    template: Any,
    data: "Datasets",
) -> dict[str, float]:
    """Answers to all evaluation records in predictions.jsonl, and their scores."""
    found = answer_all(run, model, tokenizer, template, data, folder / PREDICTIONS, bar=True)
    return {f"predict_{name}": value for name, value in found.items()}


def answer_all(
    run: Run,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    template: Any,
    data: "Datasets",
    path: Path,
    bar: bool = False,
) -> dict[str, float]:
    """Write each answer as it comes, those of an interrupted run kept; then all in order; returns their scores."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {line["index"]: line for line in read_lines(path)} if path == path.parent / PREDICTIONS else {}
    left = [index for index in range(len(rows)) if index not in done]
    prompts = [rows[index]["prompt_ids"] for index in left]
    with path.open("w", encoding="utf-8") as file:
        for line in done.values():
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        produced = answers(model, prompts, decoding, run.trainer.per_device_eval_batch_size)
        shown = bar and not run.trainer.disable_tqdm
        for place, tokens in tqdm(produced, total=len(left), desc="predict", disable=not shown):
            index = left[place]
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()  # ChatGLM3 begins with a line break
            line = {"index": index, "prompt": rows[index]["prompt"], "label": rows[index]["answer"], "predict": text}
            done[index] = line
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    ordered = [done[index] for index in sorted(done)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))
    return run.metric.scores([line["predict"].strip() for line in ordered], [line["label"].strip() for line in ordered])
