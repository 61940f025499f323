"""A config.yaml that is damaged, of another program, or written by hand: one paragraph that names the file."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from glmtuner.config.compose import compose, presets, searched_dirs
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.redaction import flatten
from glmtuner.run_folder.saved_config import read_config, read_values

WHOLE = """\
model: {model_name_or_path: m, checkpoint_dir: [a, b]}
quant: {quantization_bit: null}
data: {dataset: [x]}
finetuning: {finetuning_type: lora, lora_rank: 8}
stage: {name: sft}
trainer: {seed: 42}
generation: {do_sample: true}
"""
ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_whole_file_is_read_and_unknown_keys_stay(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(WHOLE + "of_a_later_version: {a: 1}\n", encoding="utf-8")
    assert read_config(path) == OmegaConf.load(path)


DAMAGED = [
    ("", "model=null is not a mapping"),
    ("null", "damaged"),
    ("7", "damaged"),
    ("[1, 2]", "not a mapping"),
    ("word", "damaged"),
    ("a: [", "damaged"),
    ("a: 1\na: 2", "damaged"),
    ("[" * 5000, "damaged"),
    ("a: " * 3000, "damaged"),
    (ALIASES, "alias"),
    ("a: !!python/object/apply:os.getcwd []", "damaged"),
    ("x" * 1_100_000, "1,100,000 bytes"),
    (WHOLE.replace("model: {model_name_or_path: m, checkpoint_dir: [a, b]}", "model: [m]"), 'model=["m"] is not a mapping'),
    (WHOLE.replace("{name: sft}", "sft"), 'stage="sft" is not a mapping'),
    (WHOLE.replace("stage: {name: sft}\n", ""), "stage=null is not a mapping"),
    (WHOLE.replace("name: sft", "name: [sft]"), 'stage.name=["sft"] is not a name'),
    (WHOLE.replace("model_name_or_path: m", "model_name_or_path: null"), "model.model_name_or_path=null is not a name"),
    (WHOLE.replace("[a, b]", "a"), 'model.checkpoint_dir="a" is not a list of names'),
    (WHOLE.replace("[x]", "[x, 7]"), 'data.dataset=["x", 7] is not a list of names'),
    (WHOLE.replace("quantization_bit: null", "quantization_bit: 3"), "quant.quantization_bit=3"),
    (WHOLE + "plugins: 7\n", "plugins=7"),
    (WHOLE.replace("seed: 42", "seed: '${oc.env:HOME}'"), "trainer.seed holds an interpolation"),
    (WHOLE.replace("[x]", "['a${x}']"), "data.dataset holds an interpolation"),
    (WHOLE.replace("lora_rank: 8", "lora_rank: {a: {b: '${x}'}}"), "finetuning.lora_rank.a.b holds an interpolation"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), DAMAGED, ids=range(24))
def test_a_damaged_file_is_named(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(CheckpointError) as raised:
        read_config(path)
    message = str(raised.value)
    assert str(path) in message and said in message and "\n" not in message and len(message) < 1000
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "content", [bytes(range(256)), bytes(1000), b"\xff\xfea\x00", "a: \udcff".encode(errors="surrogatepass")]
)
def test_bytes_that_are_no_text_are_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        read_config(path)


def test_a_folder_and_a_link_to_itself_are_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, *(tmp_path / name for name in ("loop", "missing", "pipe"))):
        with pytest.raises(CheckpointError, match="is damaged"):
            read_config(path)


def test_an_escaped_interpolation_is_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(WHOLE + "name: 'a\\${b}'\n", encoding="utf-8")
    assert read_config(path).name == "a${b}"


def as_read(read: Any, path: Path) -> Any:
    """What a function returns of the file, or the message of its error."""
    try:
        return read(path)
    except CheckpointError as error:
        return str(error)


def slowly(path: Path) -> dict[str, Any]:
    return flatten(OmegaConf.to_container(read_config(path, complete=False), enum_to_str=True))


def alike(one: Any, other: Any) -> bool:
    """Whether both are the same values of the same types; a NaN is like another."""
    return repr(one) == repr(other)


WHOLE_ONES = [
    WHOLE,
    WHOLE + "x:\n- 1\n- a: 2\n",
    WHOLE + "x:\n",
    WHOLE + "model:\n  a: 1\n",
    WHOLE + "x: ''\n\n\ny: |-\n  a: 1\n\n  b: 2\n",
]


# OmegaConf takes a single word for a key without a value, which the fast reader does not
@pytest.mark.parametrize("text", [text for text, _ in DAMAGED if text != "word"] + WHOLE_ONES)
def test_the_fast_reader_refuses_what_the_other_refuses(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    fast, slow = as_read(read_values, path), as_read(slowly, path)
    assert isinstance(fast, str) == isinstance(slow, str), (fast, slow)
    if isinstance(slow, dict):
        assert alike(fast, slow)


def test_the_fast_reader_reads_every_method_and_stage_as_the_other_does(tmp_path):
    register_presets()
    found = presets(searched_dirs(None))
    choices = [f"{group}={name}" for group in ("finetuning", "stage", "quant", "parallel") for name in found[group]]
    composed, path = 0, tmp_path / "config.yaml"
    for choice in choices:
        try:
            config = compose(["model=tiny_glm", choice]).config
        except ConfigError:  # a preset that asks for more, such as a reward
            continue
        path.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
        assert alike(read_values(path), slowly(path)), choice
        composed += 1
    assert composed > len(choices) / 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=90).filter(lambda text: "$" not in text),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), VALUES, max_size=6), top=VALUES)
def test_the_fast_reader_reads_any_values_as_the_other_does(tmp_path_factory, values, top):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(WHOLE + OmegaConf.to_yaml(OmegaConf.create({"own": values, "top": top})), encoding="utf-8")
    assert alike(as_read(read_values, path), as_read(slowly, path))
