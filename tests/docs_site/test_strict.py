"""What is dead, missing or undocumented stops the build: exit code 1, a line that names it, and no site."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

Build = Callable[[], subprocess.CompletedProcess[str]]


def append(page: Path, text: str) -> None:
    page.write_text(page.read_text(encoding="utf-8") + text, encoding="utf-8")


def dead_link(project: Path) -> None:
    append(project / "docs/speed.md", "\n[nowhere](nowhere.md)\n")


def dead_anchor(project: Path) -> None:
    append(project / "docs/speed.md", "\n[nowhere](data.md#nowhere)\n")


def dead_anchor_in_chinese(project: Path) -> None:
    append(project / "docs/start.zh.md", "\n[nowhere](data.zh.md#nowhere)\n")


def missing_picture(project: Path) -> None:
    (project / "docs/report.png").unlink()


def remote_picture(project: Path) -> None:
    append(project / "docs/speed.md", "\n![a badge](https://example.org/badge.svg)\n")


def key_without_meaning(project: Path) -> None:
    path = project / "glmtuner/assets/keys.yaml"
    meanings = yaml.safe_load(path.read_text(encoding="utf-8"))
    del meanings["finetuning.lora_rank"]["zh"]
    path.write_text(yaml.safe_dump(meanings, allow_unicode=True), encoding="utf-8")


def key_that_is_none(project: Path) -> None:
    append(project / "docs/speed.md", "\nSet `trainer.learning_rat=1e-3`.\n")


def page_in_no_table(project: Path) -> None:
    (project / "docs/lost.md").write_text("# Lost\n", encoding="utf-8")


def heading_that_is_not_translated(project: Path) -> None:
    append(project / "docs/start.md", "\n## One more\n")


def preset_that_no_test_knows(project: Path) -> None:
    shutil.copy(project / "conf/model/glm5.yaml", project / "conf/model/glm6.yaml")


def preset_of_another_repository(project: Path) -> None:
    path = project / "conf/model/glm5.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("zai-org/GLM-5", "zai-org/GLM-7"), encoding="utf-8")


def broken(build: Build, project: Path, *faults: Callable[[Path], None]) -> str:
    """What the build of a project with faults prints."""
    for fault in faults:
        fault(project)
    done = build()
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert "Traceback" not in printed
    assert not (project / "site").exists()
    return printed


def test_all_that_is_wrong_in_pages_is_told_at_once(checkout: Path, build: Build) -> None:
    faults = (dead_link, missing_picture, key_that_is_none, page_in_no_table, preset_that_no_test_knows)
    printed = broken(build, checkout, *faults)
    for told in (
        "docs/speed.md: nowhere.md does not exist",
        "docs/sweeps.md: report.png does not exist",
        "docs/speed.md: trainer.learning_rat=1e-3 names no key of the configuration",
        "model=glm6: tests/unit/families/test_presets.py does not know it",
    ):
        assert printed.count(told) == 1


def test_a_page_is_in_a_table(checkout: Path, build: Build) -> None:
    told = "docs/lost.md is in no table below a heading of docs/README.md: add a row"
    assert told in broken(build, checkout, page_in_no_table)


def test_a_translation_has_the_headings_of_its_page(checkout: Path, build: Build) -> None:
    told = "docs/start.zh.md: it has headings of the levels"
    printed = broken(build, checkout, heading_that_is_not_translated, preset_of_another_repository)
    assert told in printed and "model=glm5: its file names zai-org/GLM-7" in printed


def test_a_key_has_a_meaning_in_both_languages(checkout: Path, build: Build) -> None:
    told = "finetuning.lora_rank has no meaning in glmtuner/assets/keys.yaml (zh)"
    assert told in broken(build, checkout, key_without_meaning)


def test_an_anchor_exists(checkout: Path, build: Build) -> None:
    """In the pages of both languages."""
    printed = broken(build, checkout, dead_anchor, dead_anchor_in_chinese)
    assert "speed.md" in printed and "start.md" in printed and printed.count("anchor does not exist") >= 2


def test_a_page_loads_nothing_from_elsewhere(checkout: Path, build: Build) -> None:
    printed = broken(build, checkout, remote_picture)
    assert "en/speed.html: loads https://example.org/badge.svg" in printed


def test_a_site_that_stands_is_kept_when_the_next_one_is_wrong(checkout: Path, build: Build) -> None:
    """And a page without a translation is in the Chinese site, in English, which it says."""
    (checkout / "docs/start.zh.md").unlink()
    for page in [checkout / "README_zh.md", *(checkout / "docs").glob("*.zh.md")]:
        page.write_text(page.read_text(encoding="utf-8").replace("start.zh.md", "start.md"), encoding="utf-8")
    done = build()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "start.md" in done.stdout
    page = (checkout / "site/zh/start.html").read_text(encoding="utf-8")
    assert "本页暂无中文版" in page and "Getting started" in page
    dead_link(checkout)
    assert build().returncode == 1
    assert (checkout / "site/zh/start.html").read_text(encoding="utf-8") == page


def test_a_folder_that_is_no_site_is_not_replaced(checkout: Path, build: Build) -> None:
    (checkout / "site").mkdir()
    (checkout / "site/mine.txt").write_text("mine", encoding="utf-8")
    done = build()
    assert done.returncode == 2 and "has files that no site has" in done.stderr
    assert (checkout / "site/mine.txt").read_text(encoding="utf-8") == "mine"
