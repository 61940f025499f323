"""Generate records of any number for the benchmark of preprocessing: conversations in Chinese and English, about 1 kB each."""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SAMPLES = Path(__file__).resolve().parent.parent / "glmtuner/assets/data"
SEED = 42
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="records")
    parser.add_argument("path", type=Path, help="the file to write, .jsonl")
    options = parser.parse_args()
    print(f"{write(options.path, options.count):,} bytes in {options.path}")


if __name__ == "__main__":
    main()
