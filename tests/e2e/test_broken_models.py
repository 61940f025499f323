"""A checkpoint that is broken in one of the ways that checkpoints break ends in one paragraph, and nothing is written."""

import json
import re
from pathlib import Path

import pytest
import torch
from upstream import write_checkpoint

from glmtuner.cli.main import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a69c242ce014c88c2b26089270f6198f3c0b7\nsize 2706249\n"
SHARD = "pytorch_model-00002-of-00002.bin"


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


CASES = {
    "pointer_for_weights": ("chatglm2_6b", lambda at: (at / "model.safetensors").write_text(POINTER), "run `git lfs pull`"),
    "pointer_for_tokenizer": ("chatglm3_6b", lambda at: (at / "tokenizer.model").write_text(POINTER), "run `git lfs pull`"),
    "half_a_file": ("chatglm2_6b", lambda at: half(at / "model.safetensors"), "model.safetensors is damaged"),
    "half_a_shard": ("chatglm_6b", lambda at: half(at / SHARD), "its files are damaged"),
    "no_shard": ("chatglm_6b", lambda at: (at / SHARD).unlink(), f"incomplete.*{SHARD}"),
    "no_tokenizer": ("chatglm_6b", lambda at: (at / "ice_text.model").unlink(), "neither ice_text.model nor"),
    "code_in_a_bin_file": ("chatglm_6b", lambda at: torch.save({"x": _Evil()}, at / SHARD), "nothing else is unpickled"),
    "more_layers": ("chatglm2_6b", lambda at: change_config(at, num_layers=4), "lacks 7 of the model's weights"),
    "other_shapes": ("chatglm2_6b", lambda at: change_config(at, ffn_hidden_size=48), "do not belong together"),
    "obsolete": ("chatglm_6b", lambda at: change_config(at, vocab_size=150528), "before April 2023"),
    "two_readings": ("causal_lm", lambda at: change_config(at, rope_ratio=50), "type model.family=chatglm2 or chatglm3"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_broken_checkpoint_is_one_paragraph(
    tmp_path: Path, upstream_files: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    preset, spoil, told = CASES[case]
    folder = write_checkpoint("chatglm2_6b" if preset == "causal_lm" else preset, tmp_path / "base", upstream_files)
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    code = main(
        [
            f"model={preset}", "model.model_name_or_path=base", "tracker=none", "data.dataset=belle_sample",
            "data.max_samples=4", "trainer.output_dir=run",
        ]
    )  # fmt: skip
    done = capsys.readouterr()
    assert code == 2, done.err
    assert "Traceback" not in done.err and "code ran" not in done.out
    (paragraph,) = [line for line in done.err.splitlines() if line.startswith("glmtuner: ")]
    assert re.search(told, paragraph), paragraph
    assert not (tmp_path / "run").exists()
