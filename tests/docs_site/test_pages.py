"""The built pages, read as HTML: what GitHub shows of a page is shown, and the references hold everything that there is."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from documented import ROOT
from markdown_it import MarkdownIt

from glmtuner.cli.verbs import VERBS
from glmtuner.config.compose import compose
from glmtuner.config.key_meanings import key_meanings
from glmtuner.launch.register import register_presets

COUNTED = (
    "h1",
    "h2",
    "h3",
    "h4",
    "p",
    "ul",
    "ol",
    "li",
    "table",
    "tr",
    "th",
    "td",
    "pre",
    "code",
    "strong",
    "em",
    "img",
)
GITHUB = MarkdownIt("commonmark", {"html": True}).enable("table")


class Article(HTMLParser):
    """What stands in a page: how many of each element, the words, and the words below each anchor."""

    def __init__(self, is_whole_page: bool) -> None:
        super().__init__()
        self.is_inside = not is_whole_page
        self.count: Counter[str] = Counter()
        self.text: dict[str, str] = {"": ""}
        self.anchor = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_inside = self.is_inside or tag == "article"
        if self.is_inside:
            self.count[tag] += 1
            if re.fullmatch(r"h\d", tag):
                self.anchor = dict(attrs).get("id") or self.anchor
                self.text.setdefault(self.anchor, "")

    def handle_endtag(self, tag: str) -> None:
        self.is_inside = self.is_inside and tag != "article"

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.text[self.anchor] += data


def read(page: Path) -> Article:
    article = Article(is_whole_page=True)
    article.feed(page.read_text(encoding="utf-8"))
    return article


def sources() -> list[tuple[str, str, Path]]:
    """Language, page of the site, and the file that GitHub shows."""
    docs = ROOT / "docs"
    found = [("en", "index", ROOT / "README.md"), ("zh", "index", ROOT / "README_zh.md")]
    for file in sorted(docs.glob("*.md")):
        language, name = ("zh", file.name[:-6]) if file.name.endswith(".zh.md") else ("en", file.stem)
        found.append((language, "contents" if name == "README" else name, file))
    return found


@pytest.mark.parametrize(("language", "name", "file"), sources(), ids=lambda it: it if isinstance(it, str) else "")
def test_a_page_has_what_github_shows(language: str, name: str, file: Path, site: Path) -> None:
    """By another implementation of Markdown: lists in lists, tables and code are not taken for something else."""
    shown, wanted = read(site / language / f"{name}.html"), Article(is_whole_page=False)
    wanted.feed(GITHUB.render(file.read_text(encoding="utf-8")))
    without_switch = {"p": 1} if "README" in file.name else {}
    assert {tag: shown.count[tag] for tag in COUNTED} == {
        tag: wanted.count[tag] - without_switch.get(tag, 0) for tag in COUNTED
    }


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_key_has_its_place_and_its_meaning(language: str, site: Path) -> None:
    """The keys are those of keys.yaml, which is written by hand."""
    missing = []
    pages = [read(page) for page in sorted((site / language / "reference").glob("*.html"))]
    places = {anchor: text for page in pages for anchor, text in page.text.items()}
    for key, meanings in key_meanings().items():
        plain = re.sub(r"\W", "", meanings[language])
        if plain not in re.sub(r"\W", "", places.get(key, "")):
            missing.append(key)
    assert missing == []
    assert len(key_meanings()) > 400


def test_a_default_is_what_a_run_has(site: Path) -> None:
    """Of numbers and words that only the default presets decide."""
    register_presets()
    run = compose(["model=tiny_glm", "data.dataset=belle_sample", "tracker=none"]).run
    wanted = {
        "finetuning.lora_rank": run.finetuning.lora_rank, "data.max_source_length": run.data.max_source_length,
        "trainer.save_steps": run.trainer.save_steps, "generation.top_k": run.generation.top_k,
    }  # fmt: skip
    for key, value in wanted.items():
        text = read(site / f"en/reference/{key.partition('.')[0]}.html").text[key]
        assert re.search(rf"default: {value:g}\b", text), text


def test_presets_that_set_a_key_are_named(site: Path) -> None:
    text = read(site / "en/reference/finetuning.html").text["finetuning.lora_rank"]
    assert "finetuning=qlora (64)" in text and "finetuning=lora (8)" in text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_verb_and_option_is_in_the_page_of_commands(language: str, site: Path) -> None:
    places = read(site / language / "reference/commands.html").text
    assert not {*VERBS, "glmtuner"} - places.keys()
    assert "--host" in places["serve"] and "--push-to" in places["export"] and "--vscode" in places["schema"]
    assert "--check" in places["glmtuner"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_model_preset_and_architecture_is_shown(language: str, site: Path) -> None:
    models, architectures = (
        "".join(read(site / language / name).text.values()) for name in ("reference/models.html", "architectures.html")
    )
    assert [path.stem for path in sorted((ROOT / "conf/model").glob("*.yaml")) if path.stem not in models] == []
    expected = json.loads((ROOT / "tests/architectures/expected.json").read_text(encoding="utf-8"))
    assert [name for name in expected if name not in architectures] == []
    glm4 = sum(told == "ok" for told in expected["glm4"].values())
    assert f"{glm4} / {len(expected['glm4'])}" in models


def test_both_languages_have_the_same_pages_and_anchors(site: Path) -> None:
    pages = {
        language: {page.relative_to(site / language) for page in (site / language).rglob("*.html")}
        for language in ("en", "zh")
    }
    assert pages["en"] == pages["zh"] and len(pages["en"]) > 50
    for page in pages["en"]:
        english, chinese = ([*read(site / language / page).text] for language in ("en", "zh"))
        assert english == chinese, page


def test_chinese_words_are_not_parted_at_the_ends_of_lines(site: Path) -> None:
    for page in ("start", "data", "stages"):
        text = (site / f"zh/{page}.html").read_text(encoding="utf-8")
        assert re.findall(r"[\u4e00-\u9fff，。；]\n[\u4e00-\u9fff]", text) == []
