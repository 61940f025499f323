"""Folders of models, adapters, prefixes and checkpoints, damaged at random: one paragraph within ten seconds, or the right result.

The right result is that of transformers and PEFT with the same files; of a damaged checkpoint, that of a run without one.
ATTACK_MODELS is the number of folders (200), ATTACK_SEED their first seed.
"""

import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmtuner.cli.main import main
from glmtuner.config.compose import compose
from glmtuner.config.paths import ASSETS
from glmtuner.launch.build import finished_run
from glmtuner.models.load import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
from upstream import write_checkpoint

COUNT = int(os.environ.get("ATTACK_MODELS", "200"))
FIRST = int(os.environ.get("ATTACK_SEED", "0"))
LIMIT_S = 10  # of the processor; a machine that does other things, too, gets WAIT_S
WAIT_S = 120
IDS = torch.tensor([[10, 20, 30, 40, 50, 60]])
SHORT = (
    "tracker=none", "data.dataset=belle_sample", "data.max_samples=4", "data.max_source_length=24",
    "data.max_target_length=12", "trainer.per_device_train_batch_size=2", "trainer.max_steps=2", "trainer.save_steps=1",
    "trainer.logging_steps=1", "trainer.disable_tqdm=true", "trainer.learning_rate=1e-3", "finetuning.lora_dropout=0",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    "abc", "", -1, 0, 1, 3, 10**9, 2**70, 1.5, float("nan"), float("inf"), None, True, False, [], [1, 2], {}, {"a": 1}, [[]], "\ud800", "../..",
)  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a69c242ce014c88c2b26089270f6198f3c0b7\nsize 2706249\n"


class TooLong(BaseException):
    """More than LIMIT_S; no handler of `Exception` takes it for an error."""


class _Code:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


# How a file is damaged


def damage_json(path: Path, dice: random.Random) -> str:
    """Change, add or remove one value, or break the file as JSON."""
    text = path.read_text(encoding="utf-8")
    how = dice.choice(
        ["value"] * 12 + ["remove"] * 3 + ["half", "empty", "list", "null", "garbage", "deep", "utf16", "string"]
    )
    if how in ("value", "remove"):
        value = json.loads(text)
        place: Any = value
        keys: list[Any] = []
        while isinstance(place, dict) and place:
            keys.append(dice.choice(sorted(place)))
            if not isinstance(place[keys[-1]], dict) or not place[keys[-1]] or dice.random() < 0.3:
                break
            place = place[keys[-1]]
        odd = dice.choice(ODD)
        if how == "value":
            place[keys[-1]] = odd
        else:
            del place[keys[-1]]
        path.write_text(json.dumps(value), encoding="utf-8")
        return f"{path.name}: {'.'.join(map(str, keys))} = {odd if how == 'value' else 'removed'!r}"
    content = {
        "half": text[: len(text) // 2], "empty": "", "list": "[]", "null": "null", "garbage": "\x00\x01{", "string": '"x"',
        "deep": "[" * 100_000, "utf16": text,
    }[how]  # fmt: skip
    path.write_text(content, encoding="utf-16" if how == "utf16" else "utf-8")
    return f"{path.name}: {how}"


def damage_file(path: Path, dice: random.Random) -> str:
    """Remove the file, or put something else in its place."""
    how = dice.choice(
        ["removed", "empty", "half", "short", "pointer", "garbage", "folder", "loop", "dangling", "header"]
    )
    content = path.read_bytes()
    path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how in ("half", "short"):
        path.write_bytes(content[: len(content) // 2 if how == "half" else -3])
    elif how == "pointer":
        path.write_text(POINTER, encoding="utf-8")
    elif how == "garbage":
        path.write_bytes(dice.randbytes(500))
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "header":
        place = dice.randrange(min(200, len(content)))
        path.write_bytes(content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :])
    return f"{path.name}: {how}"


def damage_tensors(path: Path, dice: random.Random) -> str:
    """Write a readable file with other tensors."""
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    how = dice.choice(
        [
            "nan",
            "infinite",
            "shape",
            "transposed",
            "removed",
            "renamed",
            "added",
            "layer",
            "integers",
            "none",
            "scalar",
            "half",
        ]
    )
    value = tensors[name]
    if how in ("nan", "infinite"):
        value.view(-1)[dice.randrange(value.numel())] = float(how.replace("infinite", "inf"))
    elif how == "shape":
        tensors[name] = value[:-1].clone()
    elif how == "transposed":
        tensors[name] = value.t().contiguous() if value.dim() == 2 else value[None]
    elif how == "removed":
        del tensors[name]
    elif how == "renamed":
        tensors[name + "_"] = tensors.pop(name)
    elif how == "added":
        tensors["something.else"] = torch.zeros(2)
    elif how == "layer":
        tensors |= {
            key.replace("layers.0.", "layers.9."): kept.clone() for key, kept in tensors.items() if "layers.0." in key
        }
    elif how == "integers":
        tensors[name] = value.to(torch.int32)
    elif how == "none":
        tensors = {}
    elif how == "scalar":
        tensors[name] = torch.tensor(1.0)
    elif how == "half":
        tensors = {key: kept.half() for key, kept in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name}: {how} {name}"


def damage_index(path: Path, dice: random.Random) -> str:
    index = json.loads(path.read_text(encoding="utf-8"))
    name = dice.choice(sorted(index["weight_map"]))
    other = dice.choice(
        ["../glm/model.safetensors", "/etc/passwd", "nowhere.safetensors", "", None, 5, "config.json", []]
    )
    index["weight_map"][name] = other
    path.write_text(json.dumps(index), encoding="utf-8")
    return f"{path.name}: {name} in {other!r}"


def damage_bin(path: Path, dice: random.Random) -> str:
    content = dice.choice(
        [{"x": _Code()}, [1, 2], {"model": {}}, torch.zeros(2), {1: torch.zeros(2)}, {}, {"x": torch.zeros(2)}]
    )
    torch.save(content, path)
    return f"{path.name}: {type(content).__name__}"


def damage(folder: Path, dice: random.Random) -> str:
    """Damage one file of the folder; returns how."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md" and path.stat().st_size
    ]
    path = dice.choice(files)
    ways: list[Callable[[Path, random.Random], str]] = [damage_file]
    if path.name.endswith(".index.json"):
        ways += [damage_index] * 2
    if path.suffix == ".json":
        ways += [damage_json] * 4
    if path.suffix == ".safetensors":
        ways += [damage_tensors] * 4
    if path.suffix in (".bin", ".pt", ".pth"):
        ways += [damage_bin]
    return dice.choice(ways)(path, dice)


# What is damaged, and what is done with it


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, upstream_files: Path) -> Path:
    """Folders of every kind, undamaged."""
    root = tmp_path_factory.mktemp("good")
    shutil.copytree(ASSETS / "tiny_glm", root / "glm")
    model = AutoModelForCausalLM.from_pretrained(root / "glm", dtype=torch.float32)
    model.save_pretrained(root / "sharded", max_shard_size="3MB")
    AutoTokenizer.from_pretrained(root / "glm").save_pretrained(root / "sharded")
    write_checkpoint("chatglm2_6b", root / "chatglm2", upstream_files)
    settings = {
        "use_dora": True,
        "rank_pattern": {"q_proj": 2},
        "modules_to_save": ["norm"],
        "alpha_pattern": {"k_proj": 3},
    }
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(root / "adapter")
    for name, method in (("checkpoints", "lora"), ("prefix", "p_tuning"), ("freeze", "freeze")):
        words = (*SHORT, f"finetuning={method}") if method == "lora" else (*SHORT[:-1], f"finetuning={method}")
        assert main(["model=tiny_glm", *words, f"trainer.output_dir={root / name}"]) == 0
    return root


def train_on(folder: Path) -> list[str]:
    return [
        "model=causal_lm",
        f"model.model_name_or_path={folder}",
        "model.family=auto",
        *SHORT,
        f"trainer.output_dir={folder}.out",
    ]


KINDS: dict[str, Callable[[Path], list[str]]] = {
    "glm": train_on,
    "sharded": train_on,
    "chatglm2": lambda folder: [*train_on(folder), "model.family=chatglm2"],
    "adapter": lambda folder: [
        "model=tiny_glm", f"model.checkpoint_dir={folder}", *SHORT, f"trainer.output_dir={folder}.out"
    ],
    "prefix": lambda folder: [
        "finetuning=p_tuning", f"model.checkpoint_dir={folder}/adapter", "model=tiny_glm", *SHORT[:-1], f"trainer.output_dir={folder}.out"
    ],
    "freeze": lambda folder: [
        "finetuning=freeze", f"model.checkpoint_dir={folder}/model", "model=tiny_glm", *SHORT[:-1], f"trainer.output_dir={folder}.out"
    ],
    "checkpoints": lambda folder: ["model=tiny_glm", *SHORT, f"trainer.output_dir={folder}"],
}  # fmt: skip


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = [signal.signal(signum, stop) for signum in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(WAIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def run(words: list[str]) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command; it is in this process, and ends within LIMIT_S."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), time_limit():
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def check_result(kind: str, folder: Path, good: Path, out: str) -> None:
    """A command that ended with 0 computed what transformers or PEFT computes with the same files."""
    if kind == "checkpoints":
        wanted = load_file(good / "checkpoints/adapter/adapter_model.safetensors")
        found = load_file(folder / "adapter/adapter_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        return
    if kind in ("glm", "sharded"):
        theirs, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["mismatched_keys"]
        for name, value in load_file(folder / "model.safetensors").items() if kind == "glm" else ():
            assert name in dict(theirs.named_parameters()) or f"such as {name}" in out.replace("\n", " ")
            assert torch.isfinite(value).all()
        loaded = compose(train_on(folder)).run
        ours = load_model(loaded.model, None, loaded.quant, torch.device("cpu"), torch.float32)
        assert torch.equal(logits(ours), logits(theirs))
    if kind == "adapter":
        base = AutoModelForCausalLM.from_pretrained(good / "glm", dtype=torch.float32)
        wanted_logits = logits(PeftModel.from_pretrained(base, folder))
        adapted = finished_run([folder], ["model=tiny_glm"]).model
        assert (logits(adapted) - wanted_logits).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_a_damaged_folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    folder = tmp_path / kind
    shutil.copytree(good / kind, folder)
    inner = {"prefix": "adapter", "freeze": "model"}.get(kind, "")
    if kind == "checkpoints":
        (folder / "metrics.json").unlink()
        shutil.rmtree(folder / "adapter")
        newest = dice.choice(["checkpoint-1", "checkpoint-2"])
        if newest == "checkpoint-1":
            shutil.rmtree(folder / "checkpoints/checkpoint-2")
        inner = f"checkpoints/{newest}"
    how = damage(folder / inner, dice)
    try:
        code, out, err = run(KINDS[kind](folder))
    except Exception as error:
        pytest.fail(f"{how}: a traceback: {type(error).__name__}: {error}")
    except TooLong:
        pytest.fail(f"{how}: more than {LIMIT_S} s of the processor, or {WAIT_S} s in all")
    assert "code ran" not in out
    if code == 0:
        check_result(kind, folder, good, out)
        return
    assert code == 2, f"{how}: {code}\n{err}"
    (paragraph,) = [line for line in err.splitlines() if line.startswith("glmtuner: ")]
    assert len(paragraph) < 2500 and "Traceback" not in err, how
    assert kind == "checkpoints" or not Path(f"{folder}.out").exists(), how
