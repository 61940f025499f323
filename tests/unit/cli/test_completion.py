"""Completion in the shells themselves: bash, zsh and fish are driven without a terminal, and say what they would offer."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from glmtuner.cli import complete
from glmtuner.cli.complete import after_program, candidates, split
from glmtuner.cli.completion import SCRIPTS, script
from glmtuner.cli.main import main
from glmtuner.cli.verbs import VERBS
from glmtuner.config.compose import presets
from glmtuner.config.paths import conf_dir

BASH = """\
source "$SCRIPT"
COMP_LINE="$LINE" COMP_POINT=${#LINE} COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
read -ra COMP_WORDS <<<"$LINE"
complete -p "${COMP_WORDS[0]}" >&2
function=$(complete -p "${COMP_WORDS[0]}" | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')
"$function" "${COMP_WORDS[0]}" "" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""
# An interactive zsh in a terminal of its own: what it offers at TAB goes into $FOUND, and the line after it into $TYPED.
ZSH_RC = """\
autoload -Uz compinit; compinit -u -d $DUMP
source $SCRIPT
compadd() {
    local -i at
    for ((at = 1; at <= $#; at++)); do
        [[ "${@[at]}" == -a ]] && print -rl -- "${(P@)@[at + 1]}" >> $FOUND
    done
    builtin compadd "$@"
}
tell() { print -r -- "$BUFFER" > $TYPED }
zle -N tell
bindkey '^I' complete-word
bindkey '^X' tell
print ready > $READY
"""
ZSH = """\
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "source $RC"
for i in {1..400}; do [[ -e $READY ]] && break; sleep 0.05; done
zpty -w -n shell "$LINE"$'\\t\\x18'
for i in {1..200}; do [[ -s $TYPED ]] && break; sleep 0.05; done
zpty -d shell
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An index of its own, made once."""
    before = os.environ.get("GLMTUNER_CACHE"), os.environ.get("LC_ALL")
    os.environ["GLMTUNER_CACHE"], os.environ["LC_ALL"] = str(tmp_path_factory.mktemp("cache")), "C.UTF-8"
    yield
    for name, value in zip(("GLMTUNER_CACHE", "LC_ALL"), before, strict=True):
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def texts(line):
    words = split(line)
    behind = after_program(words)
    return [text for text, _ in candidates(behind[:-1], behind[-1])]


OFFERED = [
    ("finetuning=lo", {"finetuning=lora"}),
    ("quant=", {"quant=int4", "quant=int8", "quant=none"}),
    ("finetuning=lora,f", {"finetuning=lora,freeze", "finetuning=lora,full"}),
    ("reward=[number,f", {"reward=[number,format"}),
    ("trainer.lea", {"trainer.learning_rate="}),
    ("trainer.bf16=", {"trainer.bf16=true", "trainer.bf16=false"}),
    ("trainer.eval_strategy=", {"trainer.eval_strategy=no", "trainer.eval_strategy=steps", "trainer.eval_strategy=epoch"}),
    ("model.dtype=b", {"model.dtype=bfloat16"}),
    ("trainer.tf32=n", {"trainer.tf32=null"}),
    ("data.dataset=belle_s", {"data.dataset=belle_sample"}),
    ("data.dataset=[alpaca_zh,belle_s", {"data.dataset=[alpaca_zh,belle_sample"}),
    ("++trainer.see", {"++trainer.seed="}),
    ("obj", {"objective="}),
    ("hydra/lau", {"hydra/launcher="}),
    ("hydra/launcher=s", {"hydra/launcher=slurm", "hydra/launcher=shared"}),
    ("hydra.launcher.part", {"hydra.launcher.partition="}),
    ("finetuning=freeze finetuning.", {"finetuning.finetuning_type=", "finetuning.num_layer_trainable=", "finetuning.name_module_trainable="}),
    ("stage=dpo stage.b", {"stage.beta="}),
    ("--cf", {"--cfg"}),
    ("--cfg ", {"job", "hydra", "all"}),
    ("exp", {"export", "experiment="}),
    ("report --pap", {"--paper"}),
    ("report --paper ", {"en", "zh"}),
    ("completion ", {"bash", "zsh", "fish"}),
    ("keys lora_r", set()),
    ("keys finetuning.lora_r", {"finetuning.lora_rank"}),
    ("chat outputs/day/one generation.eng", {"generation.engine="}),
    ("export outputs/day/one generation.engine=v", {"generation.engine=vllm"}),
    ("show outputs/d", {"outputs/day/"}),
    ("show ", {"outputs/day/one", "outputs/sweeps/rates", "outputs/"}),
    ("model.checkpoint_dir=outputs/day/", {"model.checkpoint_dir=outputs/day/one/"}),
    ("data.dataset=my.", {"data.dataset=my.jsonl"}),
    ("data.dataset=of_m", {"data.dataset=of_mine"}),
    ("trainer.no_such", set()),
    ("nowhere.", set()),
]  # fmt: skip


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    run = tmp_path / "outputs" / "day" / "one"
    run.mkdir(parents=True)
    for name in ("config.yaml", "overrides.txt", "provenance.json"):
        (run / name).write_text("{}", encoding="utf-8")
    (tmp_path / "outputs" / "sweeps" / "rates").mkdir(parents=True)
    (tmp_path / "my.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"of_mine": {"file_name": "a.json"}}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("typed", "offered"), OFFERED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_offered(workspace, typed, offered):
    if typed == "show ":
        (workspace / "data" / "dataset_info.json").unlink()
        (workspace / "data").rmdir()
    assert {*texts(f"python -m glmtuner {typed}")} == offered == {*texts(f"glmtuner {typed}")}


def test_at_the_start_verbs_groups_and_root_keys_are_offered(workspace):
    found = texts("python -m glmtuner ")
    assert {*VERBS} <= {*found} and {"finetuning=", "finetuning.", "name=", "plugins=", "benchmark=", "kernels="} <= {
        *found
    }
    assert {f"{group}=" for group in presets([conf_dir()])} <= {*found} and "kernels." not in found
    assert not any(text.startswith("hydra") for text in found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a b", ["a", "b"]),
        ("a b ", ["a", "b", ""]),
        ("a 'b c", ["a", "b c"]),
        ('a "b=', ["a", "b="]),
        ("a \\", ["a", ""]),
        ("", [""]),
    ],
)
def test_a_line_is_split_as_by_a_shell(line, words):
    assert split(line) == words


def test_only_our_program_is_completed():
    assert after_program(["python", "-m", "glmtuner", "a"]) == ["a"]
    assert after_program(["X=1", "/usr/bin/glmtuner", "a"]) == ["a"]
    assert after_program(["python", "-m", "pytest", "glmtuner", ""]) is None and after_program(["glmtuner"]) is None


def test_presets_of_a_config_dir_are_offered_and_new_ones_seen(workspace):
    own = workspace / "mine" / "finetuning"
    own.mkdir(parents=True)
    (own / "small.yaml").write_text("# Small.\ndefaults: [lora]\nlora_rank: 2\n", encoding="utf-8")
    assert texts("glmtuner --config-dir mine finetuning=sm") == ["finetuning=small"]
    (own / "smaller.yaml").write_text("defaults: [lora]\nlora_rank: 1\n", encoding="utf-8")
    assert texts("glmtuner -cd mine finetuning=sm") == ["finetuning=small", "finetuning=smaller"]
    assert texts("glmtuner finetuning=sm") == [] == texts("glmtuner --config-dir nowhere finetuning=sm")
    assert texts("glmtuner --config-dir mine finetuning=small finetuning.pre") == []  # it is a LoRA
    assert ("finetuning=small", "Small.") in candidates(["--config-dir", "mine"], "finetuning=s")


def test_a_damaged_index_is_made_again_and_none_is_no_crash(workspace, monkeypatch):
    monkeypatch.setenv("GLMTUNER_CACHE", str(workspace / "cache"))
    assert texts("glmtuner quant=int4")
    (index,) = [path for path in (workspace / "cache/completion").iterdir() if "int4" in path.read_text()]
    index.write_text("{", encoding="utf-8")
    assert texts("glmtuner quant=int4") == ["quant=int4"] and json.loads(index.read_text(encoding="utf-8"))["state"]
    monkeypatch.setenv("GLMTUNER_CACHE", "/proc/nowhere")
    assert texts("glmtuner quant=int4") == ["quant=int4"]  # where nothing can be stored
    monkeypatch.setattr(complete.sys, "executable", "/nowhere/python")
    assert texts("glmtuner quant=int4") == []


def test_names_that_a_terminal_would_obey_are_not_offered(workspace, capsysbinary):
    (workspace / "evil\x1b[2J").mkdir()
    (workspace / "evidence").mkdir()
    complete.main(["line", "glmtuner show ev", ""])
    assert capsysbinary.readouterr().out == b"evidence/\t\n"


def backend(*words):
    """The command of the scripts."""
    return [sys.executable, "-I", "-S", "-c", script("bash").split("-c '")[1].split("'")[0], str(complete.ROOT), *words]


def test_it_imports_nothing_heavy_and_is_fast(workspace):
    code = backend()[4] + "; print(*sys.modules, file=sys.stderr)"
    line = ["line", "python -m glmtuner trainer.lea", "="]
    texts("glmtuner x")  # the index is made before
    done = subprocess.run([*backend()[:4], code, str(complete.ROOT), *line], capture_output=True, text=True, check=True)
    assert done.stdout.split("\t")[0] == "trainer.learning_rate="
    assert not {"hydra", "omegaconf", "yaml", "torch", "rich", "rapidfuzz"} & {*done.stderr.split()}
    seconds = []
    for _ in range(5):
        start = os.times()
        subprocess.run(backend(*line), capture_output=True, check=True)
        end = os.times()  # of the processor, which others may use, too
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(seconds) < 0.3


SHELLS = [
    ("python -m glmtuner finetuning=lo", "finetuning=lora"),
    ("python -m glmtuner trainer.lea", "trainer.learning_rate="),
    ("glmtuner quant=int", "quant=int4"),
    ("python3 -m glmtuner trainer.bf16=t", "trainer.bf16=true"),
    ("glmtuner show outputs/d", "outputs/day/"),
    ("glmtuner rep", "report"),
    ("glmtuner data.dataset=belle_sam", "data.dataset=belle_sample"),
]


@pytest.fixture(params=SCRIPTS, ids=str)
def offer(request, workspace):
    """line -> what the shell offers at its end, as the words would be."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    path = workspace / f"script.{shell}"
    path.write_text(script(shell), encoding="utf-8")
    return {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}[shell], path


def in_bash(path, line):
    environment = {**os.environ, "SCRIPT": str(path), "LINE": line}
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    start = line.rpartition(" ")[2]
    cut = max(start.rfind(sign) + 1 for sign in "=:")  # where bash begins the word
    return [start[:cut] + text for text in done.stdout.splitlines()]


def in_fish(path, line):
    command = f"source {path}; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", command], capture_output=True, text=True, timeout=600, check=True
    )
    return [text.split("\t")[0] for text in done.stdout.splitlines()]


def in_zsh(path, line):
    places = {name: path.with_suffix(f".{name.lower()}") for name in ("FOUND", "TYPED", "READY", "DUMP", "RC")}
    for name in ("FOUND", "TYPED", "READY"):
        places[name].unlink(missing_ok=True)
    places["RC"].write_text(ZSH_RC, encoding="utf-8")
    environment = {**os.environ, "SCRIPT": str(path), "LINE": line, "TERM": "xterm"}
    environment |= {name: str(place) for name, place in places.items()}
    subprocess.run(["zsh", "-f", "-c", ZSH], env=environment, capture_output=True, timeout=600, check=True)
    offered = places["FOUND"].read_text(encoding="utf-8").splitlines() if places["FOUND"].exists() else []
    if len(offered) == 1:  # it is inserted, with a space where the word is whole
        start = line.rpartition(" ")[0]
        end = "" if offered[0][-1] in "=./," else " "
        assert places["TYPED"].read_text(encoding="utf-8") == f"{start} {offered[0]}{end}\n"
    return offered


def test_a_shell_completes(offer):
    ask, path = offer
    for line, word in SHELLS:
        assert word in ask(path, line), line


def test_a_shell_leaves_other_programs_of_python_alone(offer):
    ask, path = offer
    assert not [text for text in ask(path, "python -m json.tool finetuning=lo") if "lora" in text]


def test_the_verb_prints_a_script_that_the_shell_parses(capsys):
    for shell in SCRIPTS:
        assert main(["completion", shell]) == 0
        text = capsys.readouterr().out
        assert text == script(shell) and "@" not in text.replace('"$@"', "").replace("(@", "").replace("[@]", "")
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=text, text=True, check=True, capture_output=True, timeout=600)
    assert main(["completion", "csh"]) == 2
    told = capsys.readouterr().err
    assert "csh" in told and "bash" in told and told.count("\n") == 1
    assert main(["completion", "bash", "a=b"]) == 2
