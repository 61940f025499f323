"""Pages made of the project's own lists: model presets with what is tested of each, architectures, and the commands with their options."""

import argparse
import ast
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from docs_parts.pages import DocsError, Page
from docs_parts.reference import FOLDER, cell, joined, presets
from glmtuner.cli.help import help_text
from glmtuner.cli.verbs import OVERRIDDEN, VERBS
from glmtuner.families import FAMILIES

PRESET_TESTS, MATRIX = "tests/unit/families/test_presets.py", "tests/architectures/expected.json"
OUTSIDE = ("tiny_glm", "causal_lm")  # presets of no published model
WITHOUT_CONTENTS = "---\nhide:\n  - toc\n---\n\n"  # leaves the place to a wide table
WORDS = {
    "en": {
        "models": "Model presets and what is tested of them", "commands": "Commands",
        "intro": "Made of `conf/model/` and of the tests when these pages are built. [Models](../models.md) says what the presets need, and "
        "what was tried beyond this table.",
        "head": "preset | what its file says | hub id | `model_type` | family | template | LoRA's default targets | official chat template "
        "compared | architecture's cells that work",
        "yes": "yes", "no": "no", "own": "the published code's, ported",
        "legend": "“Official chat template compared”: rows and prompts of the family are compared with the template that the maker published. "
        "The last column counts the cells of [architectures](../architectures.md) that work; models of the type `chatglm` are not in that "
        "table, since transformers has no class for them: their port is compared with the published code.",
        "commands_intro": "What `--help` prints, of glmtuner and of each of its verbs. `group.key=value` are the keys of the "
        "[key reference](index.md).",
        "overrides": "Takes overrides, `group.key=value`, too.",
    },
    "zh": {
        "models": "模型预设与测试情况", "commands": "命令",
        "intro": "构建文档时由 `conf/model/` 和测试生成。各预设需要什么、此表之外还试过什么，见[模型](../models.md)。",
        "head": "预设 | 文件中的说明（英文） | 模型中心 id | `model_type` | 模型家族 | 模板 | LoRA 默认目标层 | 是否与官方对话模板对照 | 所属架构通过的项目",
        "yes": "是", "no": "否", "own": "移植自官方代码",
        "legend": "“是否与官方对话模板对照”：该家族的样本和提示词与官方发布的模板逐一比对。最后一列是[架构](../architectures.md)表中通过的项目数；"
        "`model_type` 为 `chatglm` 的模型不在那张表里，因为 transformers 没有它们的类：移植的代码与官方代码比对。",
        "commands_intro": "glmtuner 及各个子命令的 `--help` 输出（原文为英文）。`group.key=value` 中的参数见[参数参考](index.md)。",
        "overrides": "也接受 `group.key=value` 形式的参数。",
    },
}  # fmt: skip


def assigned(file: Path, name: str) -> Any:
    """The value of a constant of a module that is not imported; raises DocsError where it is not there or no plain value."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(getattr(it, "id", "") == name for it in targets):
            return ast.literal_eval(node.value) if node.value is not None else None
    raise DocsError(f"{file}: no {name}, of which the table of model presets is made")


def models_page(language: str, root: Path) -> Page:
    """Every model preset: what its file says, and what the tests compare it with."""
    words = WORDS[language]
    hub, official = (assigned(root / PRESET_TESTS, name) for name in ("HUB", "OFFICIAL"))
    matrix = json.loads((root / MATRIX).read_text(encoding="utf-8"))
    rows = []
    for preset in presets(root / "conf"):
        if preset.group != "model":
            continue
        family = FAMILIES.get(preset.values["model.family"])
        if preset.name not in hub and preset.name not in OUTSIDE:
            raise DocsError(f"model={preset.name}: {PRESET_TESTS} does not know it (HUB)")
        repo, kind = hub.get(preset.name, (preset.values["model.model_name_or_path"], family.name if family else ""))
        if repo != preset.values["model.model_name_or_path"]:
            raise DocsError(
                f"model={preset.name}: its file names {preset.values['model.model_name_or_path']}, {PRESET_TESTS} {repo}"
            )
        cells = matrix.get(kind, {})
        works = f"[{sum(told == 'ok' for told in cells.values())} / {len(cells)}](../architectures.md)" if cells else ""
        targets = ", ".join(f"`{name}`" for name in family.attention) if family else ""
        known = (
            f"[{repo}](https://huggingface.co/{repo})" if preset.name in hub else "" if repo == "???" else f"`{repo}`"
        )
        rows.append(
            " | ".join(
                [
                    f"| `{preset.name}`", cell(preset.comment), known, f"`{kind}`" if kind else "", f"`{preset.values['model.family']}`",
                    f"`{family.template}`" if family else "", targets, words["yes" if preset.name in official else "no"],
                    works or (words["own"] if kind == "chatglm" else ""),
                ]
            )
            + " |"
        )  # fmt: skip
    table = "\n".join([f"| {words['head']} |", f"|{'---|' * 9}", *rows])
    return Page(
        f"{FOLDER}/models.md",
        words["models"],
        WITHOUT_CONTENTS + joined([f"# {words['models']} {{#presets}}", words["intro"], table, words["legend"]]),
    )


def commands_page(language: str) -> Page:
    """What glmtuner and its verbs print with --help."""
    words = WORDS[language]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"  # argparse breaks lines by it
    try:
        blocks = [
            f"# {words['commands']} {{#commands}}",
            words["commands_intro"],
            "## `python -m glmtuner` {#glmtuner}",
            fenced(help_text()),
        ]
        for verb in VERBS:
            module = import_module(f"glmtuner.cli.{verb}")
            parser = argparse.ArgumentParser(
                prog=f"python -m glmtuner {verb}", description=module.__doc__, allow_abbrev=False
            )
            module.arguments(parser)
            blocks += [f"## `{verb}` {{#{verb}}}", fenced(parser.format_help())]
            blocks += [words["overrides"]] if verb in OVERRIDDEN else []
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return Page(f"{FOLDER}/commands.md", words["commands"], joined(blocks))


def fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
