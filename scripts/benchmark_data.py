"""The part `data` of benchmark.py: generated conversations in Chinese and English, about 1 kB each, from the file to the rows.

By itself it writes such a file: `python scripts/benchmark_data.py 10000000 records.jsonl`.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parent.parent / "glmtuner/assets/data"
SEED = 42
TOKENIZERS = "encode_batch of tokenizers, the same texts"
GOAL_LLAMAFACTORY, GOAL_TOKENIZERS, GOAL_MIB = 5.0, 1 / 1.5, 2048.0
LENGTH = 1024  # tokens of a prompt, of an answer, and of LLaMA-Factory's row: little is cut
SHARE = 10  # LLaMA-Factory gets one in so many records
CHARACTERS = 520  # of a record's turns, on average: nearly 1 kB in UTF-8


def sentences() -> list[str]:
    """The sentences of the sample datasets, and English ones about the same things."""
    texts: list[str] = []
    for name in ("alpaca_zh_sample", "belle_sample", "identity_sample"):
        for record in json.loads((SAMPLES / f"{name}.json").read_text(encoding="utf-8")):
            texts += [record["instruction"], record["output"]]
    chinese = [part for text in texts for part in re.findall(r"[^。！？\n]+[。！？\n]?", text) if len(part) > 5]
    subjects = (
        "The teacher",
        "A careful reader",
        "My neighbour",
        "The committee",
        "Every engineer",
        "The young doctor",
    )
    verbs = ("explains", "writes down", "compares", "remembers", "carefully measures", "translates")
    objects = ("the result of the experiment", "a list of useful words", "the price of three apples", "an old recipe",
               "the history of the city", "two different answers")  # fmt: skip
    ends = ("before lunch.", "in the morning.", "without any help.", "because it matters.", "as quickly as possible.")
    english = [f" {who} {does} {what} {end}" for who in subjects for does in verbs for what in objects for end in ends]
    drawn = random.Random(SEED)
    return [*chinese, *drawn.sample(english, min(len(english), 2 * len(chinese)))]


def records(count: int, seed: int = SEED) -> Iterator[dict[str, list[dict[str, str]]]]:
    """So many records of one to three rounds; each holds numbers that no other one does, so that no two texts are alike."""
    pool, drawn = sentences(), random.Random(seed)
    for number in range(count):
        rounds, turns = drawn.choice((1, 1, 2, 3)), []
        each = CHARACTERS // (2 * rounds)
        for turn in range(2 * rounds):
            parts, length = [f"{number}.{turn} "], 0
            while length < each:
                parts.append(pool[int(drawn.random() * len(pool))])
                length += len(parts[-1])
            turns.append({"role": "assistant" if turn % 2 else "user", "content": "".join(parts)})
        yield {"messages": turns}


def write(path: Path, count: int) -> int:
    """Write so many records as JSON lines; returns the size in bytes."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(count))
    partial.rename(path)
    return path.stat().st_size


def measure(bench: Any, ours: str, theirs: str, count: int) -> None:
    """Measure records a second from the file to the rows, and those of the tokenizers library alone; rates and peak memory."""
    data = bench.folder / "data"
    sizes = {"generated": write(data / "generated.jsonl", count)}
    sizes["generated_part"] = write(data / "generated_part.jsonl", max(count // SHARE, 1))
    info = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    for name in sizes:
        columns = {"messages": "messages"}
        info[name] = {"file_name": f"{name}.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (data / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    bench.about["data_part"] = {"records": count, "bytes": sizes["generated"]}

    def rates(role: str, folder: Path, **settings: Any) -> dict[str, float]:
        result, ended = bench.child(role, folder, **settings)
        rate, cpu_rate = (result["records"] / result[name] for name in ("seconds", "cpu"))
        peak = result.get("peak_mib", ended.peak_mib)
        return {"per_second": rate, "per_cpu_second": cpu_rate, "peak_mib": peak}

    def by_glmtuner() -> dict[str, float]:
        folder = bench.fresh("data ours")
        lengths = ("data.max_source_length", "data.max_target_length")
        typed = [each for each in bench.overrides(folder, "generated") if not each.startswith(lengths)]
        typed += [*(f"{name}={LENGTH}" for name in lengths), f"data.preprocessing_num_workers={bench.threads}"]
        return rates("glmtuner_rows", folder, overrides=typed)

    def by_llamafactory() -> dict[str, float]:
        folder = bench.fresh("data llamafactory")
        more = {"cutoff_len": LENGTH, "preprocessing_num_workers": bench.threads}
        return rates("llamafactory_prepare", folder, arguments=bench.arguments(folder, "generated_part", **more))

    def by_tokenizers() -> dict[str, float]:
        file = str(data / "generated.jsonl")
        return rates("tokenizers_batches", bench.fresh("data tokenizers"), model=str(bench.model), file=file)

    bench.take_turns("data", {ours: by_glmtuner, theirs: by_llamafactory, TOKENIZERS: by_tokenizers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, help="records")
    parser.add_argument("path", type=Path, help="the file to write, .jsonl")
    options = parser.parse_args()
    print(f"{write(options.path, options.count):,} bytes in {options.path}")


if __name__ == "__main__":
    main()
