"""What works on which architecture: the cells of `cells.py` on each checkpoint of `zoo.py`, as a table.

python tests/architectures/matrix.py                        # all; prints the cells that differ from expected.json, exit 1 if any
python tests/architectures/matrix.py --accept               # all; writes expected.json and docs/architectures.md, also in Chinese
python tests/architectures/matrix.py --only glm4_moe_lite --cells lora,full
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXPECTED, PAGE = Path(__file__).parent / "expected.json", ROOT / "docs/architectures.md"
OK, REFUSED, WRONG = "ok", "refused: ", "WRONG: "
GROUP = 6  # architectures that share a process, and its imports
LIBRARIES = ("transformers", "peft", "torch", "bitsandbytes")
CHINESE_PAGE = PAGE.with_suffix(".zh.md")
COLUMNS = {
    "lora_all": "lora, all",
    "p_tuning": "p_tuning",
    "packing": "packed",
    "checkpointing": "gradient checkpointing",
    "check": "`--check`",
}
IN_CHINESE = {
    "architecture": "架构",
    "packed": "拼接",
    "padded": "填充",
    "gradient checkpointing": "梯度检查点",
    "predict": "预测",
    "resume": "续训",
    "export": "导出",
}
REASONS = {"en": "## What is refused, and why", "zh": '## 拒绝了什么，为什么 <a id="what-is-refused-and-why"></a>'}
INTRODUCTIONS = {}
INTRODUCTIONS["en"] = """\
# Architectures

`model=causal_lm` takes every causal language model of transformers. This table is what was tried on {count} of its architectures, as
tiny random checkpoints, with {versions} on a CPU; `make test-architectures` tries it again.

- **lora, lora all, full, freeze, packed, padded, gradient checkpointing**: the first step's loss is that of plain transformers, each
  sample alone, within 1e-4; in full, packed, padded and gradient checkpointing the gradients are, too. An adapter is loaded by PEFT
  itself and has the same loss.
- **p_tuning**: it learns. **int4, int8**: the quantized base under LoRA.
- **predict**: answers at batch 1 and 8 are those of greedy decoding without a cache by plain transformers.
- **resume**: a training that goes on from a checkpoint ends in the same bytes. **export**: plain transformers loads the folder, with the
  logits of base and adapter in PEFT. **`--check`** counts the parameters that the model has.

A number is a reason for which it is refused, before anything is trained; the reasons are below.
"""
INTRODUCTIONS["zh"] = """\
# 架构

`model=causal_lm` 可以使用 transformers 中的任何因果语言模型。下表是在其中 {count} 种架构上试过的结果：用随机初始化的微型检查点，在 CPU 上以
{versions} 运行；`make test-architectures` 会重新测试。

- **lora、lora all、full、freeze、拼接、填充、梯度检查点**：第一步的损失与原生 transformers 逐条计算样本的结果相差不超过 1e-4；full、拼接、填充和
  梯度检查点还比较梯度。适配器由 PEFT 自身加载后，损失相同。
- **p_tuning**：确实学到了东西。**int4、int8**：量化底座上的 LoRA。
- **预测**：批大小为 1 和 8 时的回答，与原生 transformers 不用缓存的贪心解码一致。
- **续训**：从检查点继续的训练，最终结果逐字节相同。**导出**：原生 transformers 能加载导出的文件夹，logits 与 PEFT 中底座加适配器的一致。
  **`--check`** 数出的参数量与模型一致。

数字表示训练开始之前就被拒绝，编号对应下面的原因（原因是程序打印的英文原文）。
"""

sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def outcomes(name: str, wanted: list[str] | None) -> dict[str, str]:
    """Cell -> "ok", "refused: …" or "WRONG: …", of one architecture."""
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    from cells import CELLS, Refused, Tried, Wrong
    from zoo import write_checkpoint

    gc.collect()
    gc.freeze()  # collections, of which every training does some, took a quarter of the time to look at what is imported
    found: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(prefix=f"{name}_"))
    try:
        try:
            write_checkpoint(name, folder / "base")
        except Exception as error:
            return {"checkpoint": f"{WRONG}{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        tried = Tried(name, folder)
        for cell in CELLS:
            if wanted and cell.__name__ not in wanted:
                continue
            began = time.monotonic()
            try:
                cell(tried)
                found[cell.__name__] = OK
            except Refused as error:
                found[cell.__name__] = f"{REFUSED}{error}".replace(str(folder), "…")
            except Wrong as error:
                found[cell.__name__] = f"{WRONG}{error}"
            except Exception as error:
                found[cell.__name__] = f"{WRONG}{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if os.environ.get("MATRIX_TIMES"):
                print(f"{name} {cell.__name__} {time.monotonic() - began:.1f} s", file=sys.__stdout__, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def tried(names: list[str], wanted: list[str] | None, processes: int) -> dict[str, dict[str, str]]:
    """The outcomes of all these architectures; what is not ok is printed."""
    table: dict[str, dict[str, str]] = {}
    groups = [names[first : first + GROUP] for first in range(0, len(names), GROUP)]
    with ThreadPoolExecutor(processes) as threads:
        for found in threads.map(in_a_process, groups, [wanted] * len(groups)):
            for name, cells in found.items():
                print(f"{name}: {sum(told == OK for told in cells.values())} of {len(cells)} ok", flush=True)
                for cell, told in cells.items():
                    if told != OK:
                        print(f"    {cell}: {told}", flush=True)
            table |= found
    return table


def in_a_process(names: list[str], wanted: list[str] | None) -> dict[str, dict[str, str]]:
    """The outcomes of these architectures in a process of their own: what a run leaves behind does not reach the others.

    Not by `max_tasks_per_child`, with which an executor of Python 3.11 may wait for ever (cpython#115634).
    """
    table: dict[str, dict[str, str]] = {}
    while len(table) < len(names):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            for name in names[len(table) :]:
                try:
                    table[name] = pool.submit(outcomes, name, wanted).result()
                except BrokenProcessPool as error:  # the next one gets another process
                    table[name] = {"checkpoint": f"{WRONG}{error}"}
                    break
    return table


def changes(found: dict[str, dict[str, str]], expected: dict[str, dict[str, str]]) -> list[str]:
    """A line for each cell that is otherwise than expected."""
    return [
        f"{name} {cell}: {told}\n    expected: {expected.get(name, {}).get(cell, 'nothing: it is new')}"
        for name, cells in found.items()
        for cell, told in cells.items()
        if told != expected.get(name, {}).get(cell)
    ]


def page(table: dict[str, dict[str, str]], versions: str, language: str = "en") -> str:
    """docs/architectures.md, or docs/architectures.zh.md."""

    def word(english: str) -> str:
        return IN_CHINESE.get(english, english) if language == "zh" else english

    cells = [*dict.fromkeys(cell for found in table.values() for cell in found)]
    reasons = [*dict.fromkeys(told for found in table.values() for told in found.values() if told != OK)]
    numbers = {told: number for number, told in enumerate(reasons, 1)}

    def shown(told: str) -> str:
        return "ok" if told == OK else f"[{numbers[told]}](#r{numbers[told]})" if told in numbers else "-"

    rows = [
        f"| `{name}` | {' | '.join(shown(found.get(cell, '')) for cell in cells)} |" for name, found in table.items()
    ]
    works = {cell: sum(found.get(cell) == OK for found in table.values()) for cell in cells}
    total = f"| {len(table)} | {' | '.join(str(works[cell]) for cell in cells)} |"
    return "\n".join(
        [
            INTRODUCTIONS[language].format(count=len(table), versions=versions),
            f"| {word('architecture')} | {' | '.join(word(COLUMNS.get(cell, cell)) for cell in cells)} |", f"|---{'|:-:' * len(cells)}|",
            *rows, total, "", REASONS[language], "",
            *(f'{numbers[told]}. <a id="r{numbers[told]}"></a>{told.removeprefix(REFUSED)}' for told in reasons), "",
        ]
    )  # fmt: skip


def main() -> int:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="these architectures, with commas between them")
    parser.add_argument(
        "--kinds", action="store_true", help="one architecture of each kind of layers, attention and experts"
    )
    parser.add_argument("--cells", default="", help="these cells")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--accept", action="store_true", help="write the outcome as what is expected, and the page")
    asked = parser.parse_args()
    from zoo import ARCHITECTURES, KINDS

    names = [name for name in asked.only.split(",") if name] or list(KINDS if asked.kinds else ARCHITECTURES)
    wanted = [cell for cell in asked.cells.split(",") if cell] or None
    began = time.monotonic()
    found = tried(names, wanted, asked.processes)
    print(f"{len(found)} architectures in {time.monotonic() - began:.0f} s")
    wrong = [
        f"{name} {cell}" for name, cells in found.items() for cell, told in cells.items() if told.startswith(WRONG)
    ]
    if asked.accept:
        if wrong:
            print(f"not written: {', '.join(wrong)} are wrong", file=sys.stderr)
            return 1
        expected = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.is_file() else {}
        expected = {
            name: found.get(name, expected.get(name)) for name in ARCHITECTURES if name in found or name in expected
        }
        EXPECTED.write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
        for path, language in ((PAGE, "en"), (CHINESE_PAGE, "zh")):
            path.write_text(page(expected, versions, language), encoding="utf-8")
        return 0
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    if told := changes(found, expected):
        print("changed:", *told, sep="\n")
    return bool(told or wrong)


if __name__ == "__main__":
    sys.exit(main())
