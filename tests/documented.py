"""The commands of README.md, README_zh.md and docs/: read from the pages, and what each one is tested by."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
CHINESE = sorted(
    (ROOT / "docs").glob("*.zh.md")
)  # tests/unit/test_translations.py: their commands are those of the English pages
DOCS = sorted({*(ROOT / "docs").glob("*.md")} - {*CHINESE})
PAGES = [*READMES, *DOCS]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(python -m glmtuner [^`<…]*=[^`<…]*)`")
USER_FILE = re.compile(r"`(my_conf/[\w/]+\.yaml)`(?:(?!```).)*?^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Commands that no test of this suite runs, and why. A run whose model or dataset is on the hub needs the network, which
# is found by composing it, not listed.
NOT_RUN = {
    "make test": "it is this suite",
    "source .venv/bin/activate": "the environment that the tests run in",
    "pip install -e .": "network",
    "pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch": "network",
    "pip install dist/glmtuner-0.1.0-py3-none-any.whl": "network; tests/e2e/test_install.py installs it without its dependencies",
    "uv venv .venv": "uv is not among the packages of the tests",
    "uv pip install -e .": "network, uv",
    "conda env create --file environment.yml": "network, conda",
    "conda activate glmtuner": "network, conda",
    "docker build --tag glmtuner:cpu .": "network, Docker",
    "docker build --build-arg DEVICE=cuda --tag glmtuner:cuda .": "network, Docker",
    "docker run --rm glmtuner:cpu": "Docker",
    "docker run --rm --gpus all --ipc host --user $(id -u):$(id -g) --volume $PWD:/runs --volume $HOME/.cache/glmtuner:/cache "
    "glmtuner:cuda experiment=quickstart": "Docker, GPU",
    "pip install -e .[liger]": "network",
    "pip install -e .[vllm]": "network",
    "pip install -e .[dashboard]": "network",
    "pip install glmtuner[dashboard]": "network",
    "pip install -e .[benchmark]": "network",
    "pip install -e .[mlflow]": "network",
    "pip install -e .[ray]": "network",
    "pip install glmtuner[mlflow]": "network",
    "hf download ceval/ceval-exam --repo-type dataset --local-dir benchmarks/ceval/ceval-exam": "network",
    "python -m glmtuner trainer=benchmark model.checkpoint_dir=outputs/mine benchmark=ceval,cmmlu,mmlu,gsm8k benchmark.data_dir=benchmarks": (
        "network: lm-evaluation-harness and the sets"
    ),
    "python -m glmtuner -m finetuning=lora,freeze data.dataset=my.jsonl benchmark=[ceval] benchmark.data_dir=benchmarks objective=ceval": (
        "network: lm-evaluation-harness and the sets"
    ),
    "python scripts/benchmark.py": "network: installs LLaMA-Factory",
    "python scripts/benchmark.py --only training,prediction": "network: installs LLaMA-Factory",
    "python scripts/gpu_check.py": "GPU",
    "python scripts/gpu_check.py --page docs/performance.md": "GPU",
    "python scripts/gpu_check.py --only fast,answers --minutes 4": "GPU",
    "python scripts/gpu_check.py --only small --match int[48]": "GPU",
    "python scripts/wandb_dashboard.py ENTITY/PROJECT outputs/sweeps/rates": "network: a W&B account",
    "python scripts/wandb_dashboard.py ENTITY/PROJECT rates --objective eval_loss --knob trainer.learning_rate": (
        "network: a W&B account"
    ),
    "python -m glmtuner trainer=predict model.checkpoint_dir=outputs/mine data.dataset=my.jsonl generation.engine=vllm": (
        "GPU: vLLM"
    ),
    "GLMTUNER_OFFLINE=offline python -m glmtuner finetuning=freeze data.dataset=alpaca_zh,belle": (
        "needs what prefetch downloads; tests/e2e/test_prefetch.py runs the like"
    ),
    "python -m glmtuner export outputs/mine --to my_model_hub --push-to ORG/NAME": "network: uploads to the hub",
    "torchrun --nproc-per-node 8 -m glmtuner data.dataset=alpaca_zh": "GPU, network",
    "accelerate launch --multi_gpu --num_processes 8 -m glmtuner data.dataset=alpaca_zh": "GPU, network",
    "srun --ntasks-per-node 8 python -m glmtuner data.dataset=alpaca_zh": "GPU, network, SLURM",
}
# Commands that other tests run, in the same words or shortened.
RUN_BY = {
    "make wheel": "tests/e2e/test_install.py",
    "python -m glmtuner doctor": "tests/unit/launch/test_doctor.py",
    "python -m glmtuner doctor --json": "tests/unit/launch/test_doctor.py",
    "python -m glmtuner model=tiny_glm trainer=benchmark finetuning=none tracker=none benchmark=capitals benchmark.include_path=my_exams "
    "trainer.output_dir=outputs/capitals": "tests/benchmarks/test_page.py",
    "make quickstart": "tests/e2e/test_quickstart.py",
    "python -m glmtuner experiment=quickstart": "tests/e2e/test_quickstart.py",
    "python -m glmtuner experiment=rlhf_sft": "tests/e2e/test_stages.py",
    "python -m glmtuner experiment=rlhf_rm": "tests/e2e/test_stages.py",
    "python -m glmtuner experiment=rlhf_ppo": "tests/e2e/test_stages.py",
    "python -m glmtuner model=tiny_glm data.dataset=sums.json finetuning=full tracker=none trainer.max_steps=5 "
    "trainer.per_device_train_batch_size=25 trainer.learning_rate=1e-3 trainer.output_dir=outputs/sums_sft": "tests/e2e/test_grpo.py",
    "python -m glmtuner stage=grpo reward=number model=tiny_glm model.checkpoint_dir=outputs/sums_sft data.dataset=sums.json "
    "finetuning=full tracker=none stage.num_generations=16 stage.max_new_tokens=8 trainer.max_steps=30 "
    "trainer.per_device_train_batch_size=12 trainer.learning_rate=1e-4 trainer.lr_scheduler_type=constant trainer.logging_steps=10 "
    "trainer.output_dir=outputs/sums": "tests/e2e/test_grpo.py",
    "python -m glmtuner chat outputs/rlhf/ppo": "tests/e2e/test_chat.py",
    "python -m glmtuner -m hydra/sweeper=optuna model=tiny_glm tracker=none data.dataset=identity_sample data.dev_ratio=0.2 "
    "trainer.do_eval=true trainer.max_steps=10 objective=eval_loss trainer.learning_rate=tag(log, interval(1e-4, 1e-1)) "
    "hydra.sweeper.n_trials=8 name=rates": "tests/e2e/test_searches.py",
    "python -m glmtuner -m hydra/sweeper=optuna model=tiny_glm tracker=none data.dataset=belle_sample data.dev_ratio=0.2 "
    "trainer.do_eval=true trainer.max_steps=40 objective=eval_loss trainer.learning_rate=tag(log, interval(1e-5, 3e-2)) "
    "hydra.sweeper.n_trials=12 hydra.sweeper.rungs=[0.1,0.25,0.5] hydra.sweeper.pruner.n_startup_trials=3 name=pruned": (
        "tests/e2e/test_searches.py"
    ),
    "python -m glmtuner -m hydra/sweeper=optuna model=tiny_glm tracker=none data.dataset=identity_sample data.dev_ratio=0.2 "
    "trainer.do_eval=true objective=[eval_loss,train_runtime] trainer.learning_rate=tag(log, interval(1e-3, 1e-1)) "
    "trainer.max_steps=range(1, 9) hydra.sweeper.n_trials=10 name=cost": "tests/e2e/test_searches.py",
    "python -m glmtuner trainer=predict model.checkpoint_dir=outputs/rlhf/ppo data.dataset=feedback_sample": (
        "tests/e2e/test_stages.py"
    ),
    "python -m glmtuner finetuning=freeze data.dataset=alpaca_zh,belle": "tests/e2e/test_hub.py",
    "python -m glmtuner prefetch --folder offline finetuning=freeze data.dataset=alpaca_zh,belle": "tests/e2e/test_prefetch.py",
    "python -m glmtuner prefetch --verify offline": "tests/e2e/test_prefetch.py",
    "python -m glmtuner status outputs/sweeps/rates": "tests/slurm/test_detached.py",
    "python -m glmtuner status outputs/sweeps/rates --watch 30": "tests/unit/sweep/test_status.py",
    "python -m glmtuner board outputs": "tests/board/test_live.py",
    "python -m glmtuner board outputs --static board_page --watch 60": "tests/unit/board/test_static.py",
    "python -m glmtuner serve outputs/mine": "tests/e2e/test_serve.py",
    "python -m glmtuner serve outputs/mine generation.temperature=0.7": "tests/e2e/test_serve.py",
    "python -m glmtuner report outputs/sweeps/methods": "tests/e2e/test_report.py",
    "python -m glmtuner report outputs/sweeps/methods --paper en": "tests/e2e/test_paper.py",
    "cd outputs/sweeps/methods/paper": "tests/e2e/test_paper.py",
    "pdflatex main && bibtex main && pdflatex main && pdflatex main": "tests/e2e/test_paper.py",
    "python -m glmtuner stage=rm trainer=predict trainer.predict_with_generate=false model.checkpoint_dir=outputs/rm "
    "data.dataset=my_pairs.json": "tests/e2e/test_stages.py",
    "python -m glmtuner parallel=ddp parallel.processes=2 model=tiny_glm data.dataset=belle_sample tracker=none "
    "trainer.max_steps=4": "tests/e2e/test_parallel.py",
    "python -m glmtuner parallel=ddp parallel.processes=2 parallel.sequence=2 model=tiny_glm data.dataset=belle_sample tracker=none "
    "trainer.max_steps=4": "tests/e2e/test_sequence_parallel.py",
    **dict.fromkeys(
        (
            "python -m glmtuner diff outputs/mine outputs/other",
            "python -m glmtuner diff outputs/mine outputs/other --markdown diff.md --html diff.html",
            "python -m glmtuner diff outputs/sweeps/before outputs/sweeps/after",
            "python -m glmtuner reproduce outputs/mine --check-only",
            "python -m glmtuner reproduce outputs/mine",
            "python -m glmtuner reproduce outputs/mine --same-env",
        ),
        "tests/e2e/test_compare.py",
    ),
    "python -m glmtuner -m hydra/sweeper=race name=rates model=tiny_glm tracker=none data.dataset=belle_sample data.dev_ratio=0.3 "
    "trainer.do_eval=true trainer.max_steps=50 finetuning.lora_rank=2,8 "
    "trainer.learning_rate=3e-2,1e-2,3e-3,1e-3,1e-4,1e-5": "tests/e2e/test_race.py",
    "python scripts/gpu_check.py --cpu-rehearsal": "tests/e2e/test_gpu_check.py",
    "python scripts/gpu_check.py --from a.json b.json --page docs/performance.md": "tests/unit/test_gpu_check.py",
    "python scripts/wandb_dashboard.py ENTITY/PROJECT outputs/sweeps/rates --dry-run workspace.json": (
        "tests/unit/test_wandb_dashboard.py"
    ),
}


@dataclass(frozen=True)
class Command:
    """One documented command, its comment and line breaks removed."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def arguments(self) -> list[str] | None:
        """What follows `-m glmtuner`, whoever starts it; None for other commands."""
        for place in range(len(self.words) - 1):
            if self.words[place : place + 2] == ("-m", "glmtuner"):
                return list(self.words[place + 2 :])
        return None


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def without_comments(text: str) -> list[tuple[str, ...]]:
    """The words of each shell command of a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := tuple(shlex.split(line, comments=True)))]


def commands(page: Path) -> list[Command]:
    """The commands of a page's bash and console blocks, in order."""
    name = str(page.relative_to(ROOT))
    found = [text for language, text in blocks(page) if language in ("bash", "console")]
    return [Command(name, words) for text in found for words in without_comments(text)]


def inline_commands(page: Path) -> list[Command]:
    """The runs that a page's sentences show."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [Command(str(page.relative_to(ROOT)), tuple(shlex.split(found))) for found in INLINE.findall(text)]


def user_files() -> Iterator[tuple[str, str]]:
    """The presets of a user's own that the pages show: path and text."""
    for page in PAGES:
        yield from USER_FILE.findall(page.read_text(encoding="utf-8"))


def make_workspace(folder: Path) -> None:
    """The files that documented commands name, in a folder that they can be run in."""
    ((_, records),) = [block for block in blocks(ROOT / "README.md") if block[0] == "json"]
    for name in ("my.jsonl", "my_held_out.jsonl", "my_folder/part.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(records, encoding="utf-8")
    samples = ROOT / "glmtuner/assets/data"
    shutil.copy(samples / "preference_sample.json", folder / "my_pairs.json")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "tests/own_plugin.py", folder / "my_plugin.py")
    question = {"question": "你好", "answer": "你好！"}
    (folder / "data/faq.json").write_text(json.dumps([question]), encoding="utf-8")
    sums = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(5) for b in range(5)]
    (folder / "sums.json").write_text(json.dumps(sums), encoding="utf-8")
    for name, text in user_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        assert yaml.safe_load(text), name
