"""Print the table of docs/methods.md: every preset and every method of PEFT, trained alike on the sample that ships.

Each trains tiny_glm for 40 steps of 8 records on one processor core, and its loss is measured on other records before and after. The
learning rate is 0.01, or 0.001 where weights of the model are trained. Seconds are those of the processor, for the whole run. `--only` names some of the methods.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from pathlib import Path

from glmtuner.cli.main import main as command

ARXIV = "[{0}](https://arxiv.org/abs/{0})"
PRESETS = {
    "lora": "2106.09685", "rslora": "2312.03732", "dora": "2402.09353", "pissa": "2404.02948", "qlora": "2305.14314",
    "p_tuning": "2110.07602", "freeze": "", "full": "",
}  # fmt: skip
INITIALIZATIONS = {
    "orthogonal": "",
    "olora": "2406.01775",
    "loftq": "2310.08659",
    "eva": "2410.07170",
    "mica": "2604.01694",
}
PAPERS = {
    "ADALORA": "2303.10512", "BEFT": "2509.15974", "BOFT": "2311.06243", "C3A": "2407.19342", "DELORA": "2503.18225",
    "FOURIERFT": "2405.03003", "GLORA": "2306.07967", "GRALORA": "2505.20355", "HRA": "2405.17484", "IA3": "2205.05638",
    "LILY": "2407.09946", "LN_TUNING": "2312.11420", "LOHA": "2108.06098", "LOKR": "2309.14859", "MISS": "2409.15371",
    "OFT": "2306.07280", "OSF": "2504.07097", "PEANUT": "2410.01870", "PSOFT": "2505.11235", "PVERA": "2512.07703",
    "RANDLORA": "2502.00987", "ROAD": "2409.00119", "SHIRA": "2406.13175", "SUPERTUNING": "2607.09287", "TINYLORA": "2602.04118",
    "UNILORA": "2506.00799", "VBLORA": "2405.15179", "VERA": "2310.11454", "WAVEFT": "2505.12532",
    "DEFT": "[NeurIPS 2025](https://proceedings.neurips.cc/paper_files/paper/2025/hash/93a34a7138bdad95e874018d5f491cc6-Abstract-Conference.html)",
    "FROD": "[AAAI 2026](https://doi.org/10.1609/aaai.v40i31.39813)", "HIRA": "[ICLR 2025](https://openreview.net/forum?id=TwJrTz9cRS)",
    "TRAINABLE_TOKENS": "",
}  # fmt: skip
# Values other than PEFT's own defaults, where those do not fit a model of this size.
CONFIGS = {
    "ADALORA": "{init_r: 12, target_r: 8, tinit: 4, tfinal: 12, lora_alpha: 96}", "C3A": "{block_size: 16}", "FOURIERFT": "{n_frequency: 500}",
    "OFT": "{oft_block_size: 16}", "PSOFT": "{r: 16}", "GRALORA": "{r: 8, gralora_k: 2}", "TRAINABLE_TOKENS": "{token_indices: [3, 4, 5, 6, 7, 8]}",
    "UNILORA": "{}", "VBLORA": "{vector_length: 16, num_vectors: 64}", "WAVEFT": "{n_frequency: 500}", "RANDLORA": "{r: 16}", "ROAD": "{group_size: 32}",
}  # fmt: skip
RATE, RATE_OF_WEIGHTS = "1e-2", "1e-3"
TRAIN_WEIGHTS = ("full", "freeze", "OSF", "TRAINABLE_TOKENS")
WORDS = (
    "model=tiny_glm", "tracker=none", "metric=none", "data.dataset=alpaca_zh_sample,belle_sample", "data.eval_dataset=identity_sample",
    "data.max_samples=160", "data.max_target_length=32", "trainer.max_steps=40", "trainer.per_device_train_batch_size=8", "trainer.use_cpu=true",
    "trainer.eval_on_start=true", "trainer.do_eval=true", "trainer.save_strategy=no", "trainer.logging_steps=40", "trainer.disable_tqdm=true",
)  # fmt: skip


def rows() -> dict[str, tuple[list[str], str]]:
    """Name -> the words of the command line, and the paper."""
    found = {name: ([f"finetuning={name}"], paper) for name, paper in PRESETS.items()}
    for word, paper in INITIALIZATIONS.items():
        quant = ["quant=int4"] if word == "loftq" else []
        found[f"lora, {word}"] = (["finetuning=lora", f"finetuning.init_lora_weights={word}", *quant], paper)
    for name in sorted(PAPERS):
        config = [f"finetuning.config={CONFIGS[name]}"] if name in CONFIGS else []
        found[name] = (["finetuning=peft", f"finetuning.peft_type={name}", *config], PAPERS[name])
    return found


def measured(words: list[str], rate: str, folder: Path) -> dict[str, float]:
    """The losses before and after, and what metrics.json says of one training."""
    shutil.rmtree(folder, ignore_errors=True)
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command([*WORDS, *words, f"trainer.learning_rate={rate}", f"trainer.output_dir={folder}"])
    if code:
        raise SystemExit(f"{' '.join(words)}: {said.getvalue()[-2000:]}")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = [*(folder / "adapter").glob("adapter_model.safetensors"), *(folder / "model").glob("*.safetensors")]
    return {
        "before": next(line["eval_loss"] for line in history if "eval_loss" in line),
        "after": metrics["eval_loss"],
        "trained": metrics["trained_parameters"],
        "bytes": sum(path.stat().st_size for path in weights),
        "seconds": time.process_time() - began,
    }


def line_of(name: str, words: list[str], paper: str, folder: Path) -> str:
    """A line of the table."""
    found = measured(words, RATE_OF_WEIGHTS if name in TRAIN_WEIGHTS else RATE, folder)
    linked = ARXIV.format(paper) if paper[:1].isdigit() else paper
    return (
        f"| `{name}` | {linked} | {found['before']:.3f} → {found['after']:.3f} | {found['trained']:,.0f} | "
        f"{found['bytes'] / 1000:,.0f} | {found['seconds']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of the table's first column")
    only = parser.parse_args().only
    print(
        "| method | paper | loss before and after | trained parameters | file, kB | seconds |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        measured(["trainer.max_steps=1"], RATE, Path(folder) / "first")  # imports what the others find imported
        for name, (words, paper) in rows().items():
            if only is None or name in only:
                print(line_of(name, words, paper, Path(folder) / "run"), flush=True)


if __name__ == "__main__":
    main()
