"""Tasks of lm-evaluation-harness on small sets of their own: options of one token, options of several, answers, texts and a group."""

import json
import random
from pathlib import Path
from typing import Any

CHOICE = """\
task: words_choice
dataset_path: ORG/words
dataset_name: colours
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
num_fewshot: 3
output_type: multiple_choice
description: "The following are questions about words.\\n\\n"
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
LETTER = """\
task: words_letter
dataset_path: ORG/words
dataset_name: colours
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\n答案："
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""
ANSWER = """\
task: sums
dataset_path: sums
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Question: {{q}}\\nAnswer:"
doc_to_target: "{{a}}"
generation_kwargs: {until: [STOPS], max_gen_toks: 24, do_sample: false}
num_fewshot: 2
metric_list: [{metric: exact_match}]
filter_list:
  - {name: first-number, filter: [{function: regex, regex_pattern: "(-?[0-9]+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metadata: {version: 1.0}
"""
TEXT = """\
task: texts
dataset_path: texts
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
GROUP = """\
group: words
task: [words_choice, words_letter]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""
WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "house",
    "river",
    "stone",
    "cloud",
    "tree",
    "mountain",
    "yellow",
    "红色",
    "蓝天",
    "大山",
]


def question(drawn: random.Random) -> dict[str, Any]:
    """A question with four options, of which one is right."""
    words = drawn.sample(WORDS, 6)
    place = drawn.randrange(4)
    options = [" ".join(drawn.sample(words, drawn.randint(1, 3))) for _ in range(4)]
    return {
        "question": f"Which comes in place {place + 1} of: {', '.join(words)}?",
        "choices": options,
        "answer": place,
    }


def write_tasks(folder: Path, *, records: int = 10, stops: str = r'"Question:", "\n\n"') -> Path:
    """The tasks in tasks/, and their sets in sets/, in the hub's layout of files; returns the folder."""
    drawn = random.Random(0)
    sets: dict[str, list[Any]] = {
        "ORG/words/colours/dev-00000-of-00001": [question(drawn) for _ in range(4)],
        "ORG/words/colours/test-00000-of-00001": [question(drawn) for _ in range(records)],
        "sums/train": [{"q": f"{n} + {n + 1}", "a": str(2 * n + 1)} for n in range(5)],
        "sums/test": [{"q": f"{n} + {n + 3}", "a": str(2 * n + 3)} for n in range(records)],
        "texts/test": [{"text": " ".join(drawn.sample(WORDS, 9))} for _ in range(records)],
    }
    for name, lines in sets.items():
        path = folder / "sets" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    (folder / "tasks").mkdir(exist_ok=True)
    texts = {"choice": CHOICE, "letter": LETTER, "sums": ANSWER.replace("STOPS", stops), "texts": TEXT, "words": GROUP}
    for name, text in texts.items():
        (folder / f"tasks/{name}.yaml").write_text(text, encoding="utf-8")
    return folder
