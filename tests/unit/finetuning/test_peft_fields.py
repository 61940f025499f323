"""The committed fields of PEFT's methods are those of the installed PEFT, and are checked without it."""

import importlib.util
import json
import re
import subprocess
import sys
import typing
from importlib.metadata import version
from pathlib import Path

import pytest

from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError
from glmtuner.finetuning import peft, peft_fields
from glmtuner.finetuning.peft import REFUSED, Peft, config_class, peft_types
from glmtuner.finetuning.peft_fields import Fields, described, fields_of, fits, kind_of, stored, stored_fields
from glmtuner.launch.register import register_presets

register_presets()
ROOT = Path(__file__).parent.parent.parent.parent
VERA = ["finetuning=peft", "finetuning.peft_type=VERA"]


def test_the_committed_file_is_what_the_script_writes() -> None:
    path = ROOT / "scripts" / "generate_peft_schema.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert peft_fields.STORED.read_text(encoding="utf-8") == script.generate(), "run scripts/generate_peft_schema.py"


def test_every_field_of_every_method_is_there_with_its_type_and_default() -> None:
    known, methods = stored()
    assert known == version("peft") and methods.keys() == peft_types() - REFUSED.keys()
    for name, fields in methods.items():
        assert fields == json_round(fields_of(config_class(name))), name
        settable = {each for each in config_class(name).__dataclass_fields__ if each not in peft_fields.DESCRIPTIVE}
        assert fields.kinds.keys() == {each for each in settable if config_class(name).__dataclass_fields__[each].init}
        assert all(
            fits(fields.kinds[each], value) or value in ("required", None) for each, value in fields.defaults.items()
        )


def json_round(fields: Fields) -> Fields:
    return Fields(fields.owner, *(json.loads(json.dumps(part)) for part in (fields.kinds, fields.defaults)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["finetuning.config.rr=4"], "unknown key finetuning.config.rr; did you mean 'r'? the fields of VeraConfig: r, "),
        (["finetuning.config.r=x"], "finetuning.config.r=x: VeraConfig takes a whole number; its default is 256"),
        (["finetuning.config={r: 4, vera_dropout: a}"], "finetuning.config.vera_dropout=a: VeraConfig takes a number; its default is 0.0"),
        (["finetuning.peft_type=OFT", "finetuning.config.bias=some"], "finetuning.config.bias=some: OFTConfig takes none, all, oft_only"),
        (["finetuning.peft_type=ADAPTION_PROMPT"], "finetuning.config.adapter_len must be chosen for finetuning.peft_type=ADAPTION_PROMPT"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_told_when_the_configuration_is_composed(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        compose(["model=tiny_glm", *VERA, *words])


def test_nothing_heavy_is_loaded_for_it(tmp_path: Path) -> None:
    spy = "import sys\nfrom glmtuner.__main__ import main\ncode = main(sys.argv[1:])\nprint('CODE', code, sorted({'torch', 'transformers', 'peft'} & {*sys.modules}))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", spy, *VERA, "finetuning.config.rr=4"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "CODE 2 []"
    assert "did you mean 'r'?" in done.stderr + done.stdout


def test_the_fields_of_a_newer_peft_are_left_to_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """A field that the file does not have is accepted if the installed PEFT has it, and said; one that it has not is refused."""
    older = dict(stored()[1])
    older["VERA"] = Fields("VeraConfig", {"r": ["int"]}, {"r": 256})
    monkeypatch.setattr(peft_fields, "stored", lambda: ("0.20.0", older))
    monkeypatch.setattr(peft, "stored", peft_fields.stored)
    assert stored_fields("VERA") is None
    method = Peft(finetuning_type="peft", peft_type="VERA", config={"r": 4, "d_initial": 0.5})
    assert method.peft_config({}).d_initial == 0.5
    method.before_training(None, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"finetuning.config.d_initial: known to the installed PEFT {version('peft')}, and not to 0.20.0" in said
    with pytest.raises(ConfigError, match=r"unknown key finetuning\.config\.rr; did you mean 'r'\?"):
        Peft(finetuning_type="peft", peft_type="VERA", config={"rr": 4}).peft_config({})


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, [3], [3.0, True, "3", None], "a whole number"),
        (float, [3, 0.5], [True, "x"], "a number"),
        (typing.Optional[bool], [True, None], [1, "true"], "true or false or null"),  # noqa: UP045
        (list[str] | str | None, [["a"], "a", None], [[1], 1], "text or a list of text or null"),
        (dict[str, int], [{}, {"a": 1}], [{"a": "b"}, [1]], "a dictionary of a whole number"),
        (tuple[int, int], [[1, 2]], [["a"], 1], "a list of a whole number"),
        (typing.Literal["none", True], ["none", True], ["all", 1], "none, true"),
        (typing.Any, [1, "a", None], [], "any value"),
    ],
)  # fmt: skip
def test_a_value_fits_its_annotation(hint: object, good: list, bad: list, words: str) -> None:
    kind = kind_of(hint)
    assert json.loads(json.dumps(kind)) == kind and described(kind) == words
    assert all(fits(kind, value) for value in good) and not any(fits(kind, value) for value in bad)
