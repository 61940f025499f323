"""Chinese pages of docs/ have what their English ones have: headings with the same anchors, commands, output, numbers of tables, and links."""

import re
import sys
from pathlib import Path

import pytest
from documented import CHINESE, DOCS, ROOT, blocks, without_comments

sys.path.insert(0, str(ROOT / "scripts"))

from docs_parts.pages import ANCHOR, HEADING, LINK, anchors, headings, parts, translation

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CODE = re.compile(r"`[^`]+`")
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)


def english(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh.md", ".md"))


def prose(page: Path) -> str:
    return "".join(text for is_code, text in parts(page.read_text(encoding="utf-8")) if not is_code)


def cells(page: Path) -> list[list[str]]:
    """The cells of all rows of tables; a bar in inline code does not part them."""
    return [
        re.split(r"(?<!\\)\|", CODE.sub(lambda match: match[0].replace("|", "/"), row)[1:-1])
        for row in ROW.findall(prose(page))
    ]


def targets(page: Path) -> list[str]:
    """What a page links to, in the names of English pages."""
    links = [target for _, _, target in LINK.findall(prose(page)) if "README" not in target or "/" in target]
    return sorted(
        re.sub(r"\.zh\.md|README_zh\.md", lambda it: it[0].replace(".zh", "").replace("_zh", ""), it) for it in links
    )


def test_the_pages_that_a_user_meets_first_are_translated() -> None:
    first = (
        "README",
        "start",
        "install",
        "data",
        "models",
        "methods",
        "stages",
        "sweeps",
        "prediction",
        "serving",
        "troubleshooting",
    )
    assert sorted({f"{name}.zh.md" for name in first} - {page.name for page in CHINESE}) == []
    assert [page.name for page in CHINESE if english(page) not in DOCS] == []


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_headings_have_the_anchors_of_the_english_page(page: Path) -> None:
    ours, theirs = headings(page.read_text(encoding="utf-8")), headings(english(page).read_text(encoding="utf-8"))
    assert [level for level, _ in ours] == [level for level, _ in theirs]
    named = ["".join(ANCHOR.findall(text)) for level, text in ours if level > 1]
    assert named == [
        name
        for (level, _), name in zip(theirs, anchors(english(page).read_text(encoding="utf-8")), strict=True)
        if level > 1
    ]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_code_is_that_of_the_english_page(page: Path) -> None:
    """All of it; comments of commands are in Chinese."""
    ours, theirs = (
        [(language, without_comments(text) if language == "bash" else text) for language, text in blocks(each)]
        for each in (page, english(page))
    )
    assert ours == theirs


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_tables_have_the_numbers_and_the_code_of_the_english_page(page: Path) -> None:
    ours, theirs = cells(page), cells(english(page))
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    for our_row, their_row in zip(ours, theirs, strict=True):
        for our, their in zip(our_row, their_row, strict=True):
            assert sorted(CODE.findall(our)) == sorted(CODE.findall(their)), our
            assert sorted(NUMBER.findall(our)) == sorted(NUMBER.findall(their)), our


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_prose_names_the_code_of_the_english_page(page: Path) -> None:
    """Each `key` and `command` of one is in the other."""
    ours, theirs = (
        {" ".join(it.split()) for it in CODE.findall(without_anchors(each))} for each in (page, english(page))
    )
    assert (sorted(ours - theirs), sorted(theirs - ours)) == ([], [])


def without_anchors(page: Path) -> str:
    return "\n".join(ANCHOR.sub("", line) if HEADING.match(line) else line for line in prose(page).splitlines())


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_links_are_those_of_the_english_page(page: Path) -> None:
    assert targets(page) == targets(english(page))


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_links_of_a_chinese_page_lead_to_chinese_pages(page: Path) -> None:
    for _, _, target in LINK.findall(prose(page)):
        path = target.partition("#")[0]
        there = (page.parent / path).resolve()
        if path.endswith(".md") and not path.endswith((".zh.md", "README_zh.md")) and path != "README.md":
            assert not translation(there).exists(), target
