"""The key reference: a page for each group of the configuration, with every key, what it can be, and which presets set it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from docs_parts.pages import DocsError, Page
from glmtuner.config.compose import searched_dirs
from glmtuner.config.keys import Key, all_keys
from glmtuner.config.preset_files import default_presets, preset_files
from glmtuner.config.trainer_fields import shown
from glmtuner.data.entry_keys import entry_keys

FOLDER = "reference"
RUN = "run"  # the page of keys without a group
GROUPS = {
    RUN: ("The run itself", "运行本身"),
    "model": ("The pretrained model", "预训练模型"),
    "quant": ("How frozen weights are stored", "冻结权重的存储方式"),
    "data": ("Records, and how they become tokens", "数据记录，以及它们如何变成词元"),
    "finetuning": ("Which weights are trained", "训练哪些权重"),
    "stage": ("What is learned", "学习什么"),
    "reward": ("How stage=grpo scores answers", "stage=grpo 如何给回答打分"),
    "trainer": ("Training, evaluation and prediction", "训练、评测与预测"),
    "metric": ("How answers are scored", "如何给回答评分"),
    "generation": ("How answers are decoded", "如何解码生成回答"),
    "tracker": ("Where metrics go besides the run folder", "除运行文件夹外，指标还送往何处"),
    "parallel": ("How many processes train one run", "一次运行由多少个进程训练"),
    "budget": ("What a sweep may take", "一次扫描允许消耗多少"),
    "benchmark": ("Scores of lm-evaluation-harness' tasks", "用 lm-evaluation-harness 的任务评分"),
    "hydra.launcher": ("Where the jobs of a sweep run", "扫描的任务在何处运行"),
    "hydra.sweeper": ("Which combinations a sweep runs", "扫描运行哪些组合"),
    "dataset_info": ("An entry of the catalogue of datasets", "数据集目录中的一个条目"),
}
TYPES = {
    "any value": "任意值", "list": "列表", "list of numbers": "数字列表", "list of text": "文本列表", "list of whole numbers": "整数列表",
    "mapping": "映射", "mapping of names to any value": "名称到任意值的映射", "mapping of names to numbers": "名称到数字的映射",
    "mapping of names to whole numbers": "名称到整数的映射", "null": "null", "number": "数字", "one of the choices": "取值之一", "text": "文本",
    "true or false": "true 或 false", "whole number": "整数", "true": "true", "false": "false",
}  # fmt: skip
WORDS = {
    "en": {
        "title": "Key reference", "type": "type", "default": "default", "none": "must be set", "choices": "choices", "having": "only with",
        "setting": "set by", "keys": "keys", "group": "group", "presets": "Presets", "preset": "preset", "says": "what its file says",
        "intro": "Every key of the configuration, made from its schema and from the files of `conf/` when these pages are built. "
        "`python -m glmtuner keys` prints the same; a page on [keys, editors and completion](../keys.md) says more.",
        "kinds": "A default is that of the group's default preset; where presets differ, each is named. “Only with” names the presets "
        "that have the key, and “set by” the files of `conf/` that give it a value; ★ marks the default preset.",
        "all": "All {count} keys",
    },
    "zh": {
        "title": "参数参考", "type": "类型", "default": "默认值", "none": "必须设置", "choices": "取值", "having": "仅适用于", "setting": "由预设设定",
        "keys": "参数个数", "group": "配置组", "presets": "预设", "preset": "预设", "says": "文件中的说明（英文）",
        "intro": "配置中的每一个参数，由配置的 schema 和 `conf/` 中的文件在构建文档时生成。`python -m glmtuner keys` 打印同样的内容；"
        "更多说明见[参数、编辑器与补全](../keys.md)。",
        "kinds": "默认值取自该组的默认预设；各预设不同时逐一列出。“仅适用于”列出拥有该参数的预设，“由预设设定”列出 `conf/` 中给它赋值的文件；★ 标出默认预设。",
        "all": "全部 {count} 个参数",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A file of conf/: how it is chosen, the comment at its top, and the keys that it sets, with their values."""

    group: str
    name: str
    comment: str
    values: Mapping[str, Any]

    @property
    def choice(self) -> str:
        return f"{self.group}={self.name}"


def page_of(key: str) -> str:
    """The group on whose page a key stands."""
    if "." not in key:
        return RUN
    first, second = key.split(".")[:2]
    return f"hydra.{second}" if first == "hydra" else first


def keys_of(language: str) -> list[Key]:
    """Every key; raises DocsError where one has no meaning or no page."""
    found = [*all_keys(searched_dirs(None), language), *entry_keys(language)]
    wrong = [f"{key.name} has no meaning in glmtuner/assets/keys.yaml ({language})" for key in found if not key.meaning]
    wrong += [f"{key.name} has no page: add its group to GROUPS" for key in found if page_of(key.name) not in GROUPS]
    wrong += [f"{group} has a page and no key" for group in GROUPS if group not in {page_of(key.name) for key in found}]
    if wrong:
        raise DocsError("\n".join(wrong))
    return found


def places(keys: Iterable[Key]) -> dict[str, str]:
    """Each key's place in the site, and those of groups whose names look like keys."""
    pages = {group: f"{FOLDER}/{group}.md" for group in GROUPS if "." in group}
    return pages | {key.name: f"{FOLDER}/{page_of(key.name)}.md#{key.name}" for key in keys}


def presets(conf: Path) -> list[Preset]:
    """The files of conf/, in order of their groups."""
    found = []
    for path in sorted(conf.rglob("*.yaml")):
        *folders, name = path.relative_to(conf).with_suffix("").parts
        if not folders:
            continue
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=get_yaml_loader()) or {}
        group = "/".join(folders)
        package = re.search(r"^# @package (\S+)$", text, re.MULTILINE)
        prefix = package[1] if package else "dataset_info" if group == "dataset" else group.replace("/", ".")
        prefix = "" if prefix == "_global_" else prefix
        values = flattened({key: value for key, value in content.items() if key != "defaults"}, prefix)
        found.append(Preset(group, name, comment_of(text), values))
    return found


def comment_of(text: str) -> str:
    """The comment at the top of a file, without Hydra's `# @package`."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def flattened(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values by dotted keys; a mapping's own place is kept, too, for keys that are mappings."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found[name] = value
        if isinstance(value, dict):
            found |= flattened(value, name)
    return found


def reference(language: str, conf: Path, keys: Sequence[Key]) -> list[Page]:
    """The index of groups and the page of each."""
    words, column = WORDS[language], 0 if language == "en" else 1
    files = presets(conf)
    chosen = default_presets(conf)
    by_page: dict[str, list[Key]] = {group: [] for group in GROUPS}
    for key in keys:
        by_page[page_of(key.name)].append(key)
    rows = [f"| [`{group}`]({group}.md) | {GROUPS[group][column]} | {len(found)} |" for group, found in by_page.items()]
    listed = [f"| [`{key.name}`]({page_of(key.name)}.md#{key.name}) | {cell(key.meaning)} |" for key in keys]
    index = [
        f"# {words['title']} {{#keys}}", words["intro"], "\n".join([f"| {words['group']} | | {words['keys']} |", "|---|---|---|", *rows]),
        f"## {words['all'].format(count=len(keys))} {{#all}}", "\n".join(["| | |", "|---|---|", *listed]),
    ]  # fmt: skip
    made = [Page(f"{FOLDER}/index.md", words["title"], joined(index))]
    for group, found in by_page.items():
        title = f"{group}: {GROUPS[group][column]}"
        own = [file for file in files if file.group == group.replace(".", "/")]
        blocks = [f"# `{group}` – {GROUPS[group][column]} {{#{group}}}", words["kinds"]]
        if own:
            rows = [
                f"| `{file.choice}`{' ★' if chosen.get(file.group) == file.name else ''} | {cell(file.comment)} |"
                for file in own
            ]
            blocks += [
                f"## {words['presets']} {{#presets}}",
                "\n".join([f"| {words['preset']} | {words['says']} |", "|---|---|", *rows]),
            ]
        blocks.append(f"## {words['all'].format(count=len(found))} {{#all}}")
        blocks += [entry(key, files, language) for key in found]
        made.append(Page(f"{FOLDER}/{group}.md", title, joined(blocks)))
    return made


def entry(key: Key, files: Sequence[Preset], language: str) -> str:
    """A key: heading, meaning, and its facts."""
    words = WORDS[language]
    kind = key.type if language == "en" else type_in_chinese(key.type)
    default = words["none"] if key.default is None else code(key.default)
    setting = [f"`{file.choice}` ({code(shown(file.values[key.name]))})" for file in files if key.name in file.values]
    facts = [f"- {words['type']}: {kind}", f"- {words['default']}: {default}"]
    if key.choices:
        facts.append(f"- {words['choices']}: {', '.join(map(code, key.choices))}")
    if having := [name for preset in key.presets for name in typed_like(preset)]:
        facts.append(f"- {words['having']}: {', '.join(map(code, having))}")
    if setting:
        facts.append(f"- {words['setting']}: {', '.join(setting)}")
    return "\n".join([f"### `{key.name}` {{#{key.name}}}", "", escaped(key.meaning), "", *facts])


@cache
def typed_like(choice: str) -> list[str]:
    """The presets that have the class of this one, as group=preset."""
    group, _, preset = choice.partition("=")
    files = preset_files(searched_dirs(None))
    return list(
        dict.fromkeys([choice, *(f"{group}={it.name}" for it in files if (it.group, it.typed_as) == (group, preset))])
    )


def type_in_chinese(kind: str) -> str:
    """A type in Chinese words; raises DocsError for one that has none yet."""
    parts = kind.replace("true or false", "true_or_false").split(" or ")
    known = {**TYPES, "true_or_false": TYPES["true or false"]}
    if missing := [part for part in parts if part not in known]:
        raise DocsError(f"{', '.join(missing)}: no Chinese words for this type; add them to TYPES")
    return "，或 ".join(known[part] for part in parts)


def code(text: str) -> str:
    """Text as inline code, whatever is in it."""
    if not text:
        return "` `"
    ticks = "``" if "`" in text else "`"
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def escaped(text: str) -> str:
    """Prose whose signs are no Markdown, outside of inline code."""
    pieces = text.split("`")
    return "`".join(
        piece if index % 2 else "".join(f"\\{sign}" if sign in "*_<[]" else sign for sign in piece)
        for index, piece in enumerate(pieces)
    )


def cell(text: str) -> str:
    """Prose in a cell of a table."""
    return escaped(text).replace("|", "\\|")


def joined(blocks: Iterable[str]) -> str:
    """Blocks with an empty line between them."""
    return "\n\n".join(blocks) + "\n"
