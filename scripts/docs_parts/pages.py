"""The pages of docs/, README, CONTRIBUTING and CHANGELOG as the site's Markdown, with its links and anchors."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LANGUAGES = {"en": "English", "zh": "中文"}
HOME, CONTENTS = "index.md", "contents.md"
FILES = "files"  # the site's folder for files of the project that pages link to
CHINESE = ".zh.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`]*`|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#{1,6}) +(.*?) *$")
FENCE = re.compile(r"^ *(```|~~~)")
ANCHOR = re.compile(r' *<a id="([^"]+)"></a>')
OTHER_LANGUAGE = re.compile(r"^\[(?:中文|English)\]\(README[\w.]*\.md\).*\n\n", re.MULTILINE)  # the site has a switch
WIDE = "\u3000-\u303f\u3400-\u9fff\uff00-\uffef“”‘’…"  # Chinese characters, and punctuation that brings its own space
BREAK = re.compile(rf"(?<=[{WIDE}])\n *(?=[{WIDE}])|(?<=[，。；：、！？）])\n *(?=[A-Za-z`\[])")
NESTED = re.compile(
    r"^ {2,3}(?=(?:[-*]|\d+\.) )", re.MULTILINE
)  # GitHub nests lists by two spaces, Python-Markdown by four
KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)?)\.(\w+)(?:\+?=.*)?")
UNTRANSLATED = '!!! note "本页暂无中文版"\n\n    下面是英文原文。\n'


class DocsError(Exception):
    """What is wrong with the pages, a line each."""


@dataclass
class Page:
    """A page of the site, and the file that it comes from; one that is generated has none."""

    name: str  # of the site, such as data.md
    title: str
    text: str
    file: Path | None = None
    is_translated: bool = True


@dataclass
class Pages:
    """What is made of the project's pages in one language."""

    root: Path
    language: str
    keys: Mapping[str, str] = field(default_factory=dict)  # key -> its place in the site
    groups: frozenset[str] = frozenset()
    copied: dict[str, Path] = field(default_factory=dict)  # name in the site -> file
    problems: list[str] = field(default_factory=list)

    def all(self) -> list[Page]:
        """Every page; raises DocsError with all that is wrong."""
        found = [self.page(name, file) for name, file in self.sources().items()]
        if self.problems:
            raise DocsError("\n".join(self.problems))
        return found

    def sources(self) -> dict[str, Path]:
        """The English files by their names in the site."""
        docs = self.root / "docs"
        own = {file.name: file for file in sorted(docs.glob("*.md")) if not file.name.endswith(CHINESE)}
        own[CONTENTS] = own.pop("README.md")
        others = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
        return {
            HOME: self.root / "README.md",
            **own,
            **{name: self.root / file for name, file in others.items() if (self.root / file).exists()},
        }

    def page(self, name: str, english: Path) -> Page:
        """A page with the anchors of the English one, in Chinese where it is translated."""
        original = english.read_text(encoding="utf-8")
        chinese = translation(english)
        is_translated = self.language == "en" or chinese.is_file()
        file = english if self.language == "en" or not is_translated else chinese
        text = file.read_text(encoding="utf-8")
        if file == chinese and (told := differing_headings(original, text)):
            self.problems.append(f"{file.relative_to(self.root)}: {told}")
            return Page(name, name, text, file)
        text = OTHER_LANGUAGE.sub("", text, count=1)
        body = with_anchors(text, anchors(original))
        if name == "changelog.md":  # it names keys of the past
            body = "".join(part if is_code else self.with_links(part, file) for is_code, part in parts(body))
        else:
            body = "".join(part if is_code else self.staged(part, file) for is_code, part in parts(body))
        body = "".join(part if is_code else NESTED.sub("    ", part) for is_code, part in parts(body))
        if file == chinese:  # a line's end between two Chinese characters would be shown as a space
            body = "".join(part if is_code else BREAK.sub("", part) for is_code, part in parts(body))
        title = next(heading for _, heading in headings(text))
        if not is_translated:
            first, _, rest = body.partition("\n")
            body = f"{first}\n\n{UNTRANSLATED}{rest}"
        if name == "changelog.md":  # it names everything, and would come first in the search
            body = f"---\nsearch:\n  exclude: true\n---\n{body}"
        return Page(name, plain(title), body, file, is_translated)

    def staged(self, prose: str, file: Path) -> str:
        """Prose with the links of the site, and its keys linked to their reference."""
        pieces, end = [], 0
        for match in LINK.finditer(prose):
            pieces.append(self.with_keys(prose[end : match.start()], file))
            pieces.append(f"{match[1]}[{self.with_links(match[2], file)}]({self.target(match[3], file)})")
            end = match.end()
        return "".join([*pieces, self.with_keys(prose[end:], file)])

    def with_links(self, prose: str, file: Path) -> str:
        """Prose with the links of the site."""
        return LINK.sub(lambda match: self._link(match, file), prose)

    def _link(self, match: re.Match[str], file: Path) -> str:
        return f"{match[1]}[{match[2]}]({self.target(match[3], file)})"

    def target(self, target: str, file: Path) -> str:
        """A link's target in the site; a file that is no page is copied into it."""
        if re.match(r"\w+:", target) or target.startswith("#"):
            return target
        path, _, anchor = target.partition("#")
        there = Path(os.path.normpath(file.parent / path))
        if not there.is_file():
            self.problems.append(f"{file.relative_to(self.root)}: {target} does not exist")
            return target
        english = there.with_name(there.name.removesuffix(CHINESE) + ".md") if there.name.endswith(CHINESE) else there
        if english == self.root / "README_zh.md":
            english = self.root / "README.md"
        by_file = {source: name for name, source in self.sources().items()}
        if english in by_file:
            name = by_file[english]
            return f"{name}#{anchor}" if anchor else name
        inside = there.relative_to(self.root)
        name = inside.name if inside.parts[0] == "docs" else f"{FILES}/{inside.as_posix()}"
        self.copied[name] = there
        return name

    def with_keys(self, prose: str, file: Path) -> str:
        """Prose whose `group.key` and `group.key=value` are links to the key's reference."""

        def linked(match: re.Match[str]) -> str:
            if (
                not (found := KEY.fullmatch(match[2]))
                or len(match[1]) != 1
                or found[1].split(".")[0] not in self.groups
            ):
                return match[0]
            key = f"{found[1]}.{found[2]}"
            while key not in self.keys and "." in key:  # below a key that is a mapping
                key = key.rpartition(".")[0]
            if key not in self.keys:
                if found[2] not in SUFFIXES and f"{found[1]}.{found[2]}" not in OTHERS:
                    self.problems.append(f"{file.relative_to(self.root)}: {match[2]} names no key of the configuration")
                return match[0]
            return f"[{match[0]}]({self.keys[key]})"

        lines = prose.splitlines(keepends=True)
        return "".join(line if HEADING.match(line) else CODE.sub(linked, line) for line in lines)


CODE = re.compile(r"(`+)([^`]+)\1(?!`)")
OTHERS = {  # named by pages, and no keys of ours
    "model.quantization_bit": "refused, with the name that it has now",
    **dict.fromkeys(
        ("hydra.job", "hydra.job.env_set", "hydra.callbacks", "hydra.searchpath", "hydra.sweep.dir"), "Hydra's own"
    ),
    "reward.short.weight": "of the plugin that the page writes",
}
SUFFIXES = ("py", "md", "yaml", "json", "jsonl", "txt", "html", "safetensors", "tex")


def translation(english: Path) -> Path:
    """The Chinese file of an English one."""
    return english.with_name(
        "README_zh.md"
        if english.name == "README.md" and (english.parent / "docs").is_dir()
        else f"{english.stem}{CHINESE}"
    )


def parts(text: str) -> Iterator[tuple[bool, str]]:
    """Fenced blocks and what stands between them, in order: whether it is code, and the text."""
    held: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        found = FENCE.match(line)
        if not fence and found:
            yield False, "".join(held)
            held, fence = [line], found[1]
        elif fence and line.strip() == fence:
            yield True, "".join([*held, line])
            held, fence = [], ""
        else:
            held.append(line)
    yield bool(fence), "".join(held)


def headings(text: str) -> list[tuple[int, str]]:
    """Level and text of every heading outside of code."""
    prose = "".join(part for is_code, part in parts(text) if not is_code)
    return [(len(found[1]), found[2]) for line in prose.splitlines() if (found := HEADING.match(line))]


def plain(heading: str) -> str:
    """A heading's text without marks."""
    return LINK.sub(r"\2", ANCHOR.sub("", heading)).replace("`", "").replace("**", "")


def anchors(text: str) -> list[str]:
    """The names that GitHub gives to a page's headings, in order."""
    names: list[str] = []
    for _, heading in headings(text):
        name = re.sub(r"[^\w\- ]", "", plain(heading).strip().lower()).replace(" ", "-")
        taken = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{taken}" if taken else name)
    return names


def with_anchors(text: str, names: list[str]) -> str:
    """The page with these anchors at its headings."""
    left = iter(names)

    def named(line: str) -> str:
        found = HEADING.match(line)
        return f"{found[1]} {ANCHOR.sub('', found[2])} {{#{next(left)}}}\n" if found else line

    return "".join(
        part if is_code else "".join(map(named, part.splitlines(keepends=True))) for is_code, part in parts(text)
    )


def differing_headings(english: str, chinese: str) -> str:
    """Why a translation's headings cannot have the anchors of the original; empty where they can."""
    ours, theirs = ([level for level, _ in headings(text)] for text in (chinese, english))
    return "" if ours == theirs else f"it has headings of the levels {ours}, and the English page {theirs}"
