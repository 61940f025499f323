"""README.md, README_zh.md and docs/: their commands are valid and tested, their links resolve, both READMEs agree."""

import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
from documented import (
    CHINESE,
    DOCS,
    NOT_RUN,
    PAGES,
    READMES,
    ROOT,
    RUN_BY,
    Command,
    blocks,
    commands,
    inline_commands,
    make_workspace,
    user_files,
    without_comments,
)
from omegaconf import OmegaConf

from glmtuner.cli.main import main
from glmtuner.cli.options import parse_options
from glmtuner.cli.verbs import VERBS, _VerbParser
from glmtuner.config.compose import compose, compose_every_job, first_job, searched_dirs
from glmtuner.data.catalog import find
from glmtuner.errors import GlmtunerError
from glmtuner.launch.register import register_presets
from glmtuner.sweep.launchers import register as register_launchers
from glmtuner.sweep.search import check_sweeper

LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.])((?:glmtuner|tests|scripts|conf)/[\w/]+(?:\.\w+)?)(?![\w/<*])")
RUN_FOLDER = re.compile(r"outputs/(?!sweeps)\w+(?:/\w+)?")
ALL = [command for page in PAGES for command in (*commands(page), *inline_commands(page))]
OURS = [command for command in ALL if command.arguments is not None]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and the run folders that the commands name."""
    register_presets()
    register_launchers()
    folder = tmp_path_factory.mktemp("documented")
    make_workspace(folder)
    config = compose(["model=tiny_glm", "data.dataset=belle_sample"]).config
    named = {found for command in OURS for found in RUN_FOLDER.findall(str(command))}
    for run in (*named, "outputs/rlhf/sft", "outputs/rlhf/rm"):
        (folder / run).mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / run / "config.yaml")
        (folder / run / "provenance.json").write_text("{}", encoding="utf-8")
    return folder


def validate(arguments: list[str]) -> None:
    """Parse and compose what a command asks for, and start nothing; raises GlmtunerError."""
    if arguments and arguments[0] in VERBS:
        verb, *rest = arguments
        parser = _VerbParser(prog=f"python -m glmtuner {verb}")
        import_module(f"glmtuner.cli.{verb}").arguments(parser)
        overrides = [word for word in rest if not word.startswith("-") and "=" in word]
        parser.parse_args([word for word in rest if word not in overrides])
        compose(overrides)
        return
    options, overrides = parse_options(arguments)
    if options.help or options.version or options.info:
        with redirect_stdout(io.StringIO()):
            assert main(arguments) == 0
    elif options.multirun:
        where = {"config_dir": options.config_dir, "config_name": options.config_name}
        normalized = compose_every_job(overrides, **where)
        check_sweeper(first_job(normalized, **where), normalized, **where)
    else:
        run = compose(overrides, config_dir=options.config_dir).run
        folders = [folder / "dataset" for folder in reversed(searched_dirs(options.config_dir))]
        for name in (*run.data.dataset, *run.data.eval_dataset):
            find(name, run.data.dataset_dir, folders)


@pytest.mark.parametrize("command", {str(it): it for it in OURS}.values(), ids=str)
def test_a_documented_command_is_valid(command: Command, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    assert command.arguments is not None
    validate(command.arguments)


def test_a_wrong_command_is_not_valid(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    for wrong in (
        "finetuning=lora finetuning.lora_rnk=4",
        "data.dataset=nowhere",
        "-m quant=none,int4 finetuning=lora,freeze",
        "serve outputs/mine --prot 8000",
        "chat outputs/mine generation.temprature=1",
    ):
        with pytest.raises(GlmtunerError):
            validate(wrong.split())


def test_commands_were_found() -> None:
    assert len(commands(ROOT / "README.md")) >= 15
    assert len({command.page for command in OURS}) >= 15
    assert len(OURS) > 80
    assert len(list(user_files())) >= 3


def test_every_other_command_is_accounted_for() -> None:
    """Commands of ours that are not listed are run by tests/e2e/test_docs.py, or need the hub."""
    shown = {str(command) for command in ALL}
    assert sorted({str(it) for it in ALL if it.arguments is None} - NOT_RUN.keys() - RUN_BY.keys()) == [
        "python scripts/benchmark.py --help"  # tests/e2e/test_docs.py
    ]
    assert sorted((NOT_RUN.keys() | RUN_BY.keys()) - shown) == []
    assert not NOT_RUN.keys() & RUN_BY.keys()
    assert sorted({path for path in RUN_BY.values() if not (ROOT / path).is_file()}) == []


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = ([*map(lambda it: it.words, commands(page))] for page in READMES)
    assert english == chinese


def test_both_readmes_show_the_same_files_and_output() -> None:
    english, chinese = (
        [(language, text if language != "bash" else without_comments(text)) for language, text in blocks(page)]
        for page in READMES
    )
    assert english == chinese


def test_both_readmes_have_the_same_sections_and_links() -> None:
    def outline(page: Path) -> list[str]:
        return re.findall(r"^(#+ (?:\d\.)?)", page.read_text(encoding="utf-8"), re.MULTILINE)

    assert outline(READMES[0]) == outline(READMES[1])
    targets = [
        {link.replace(".zh.md", ".md") for link in LINK.findall(page.read_text(encoding="utf-8"))} for page in READMES
    ]
    assert targets[0] - {"README_zh.md"} == targets[1] - {"README.md"}


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES, *CHINESE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if fragment:
            text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            named = re.findall(r'<a id="([^"]+)">', text)
            assert fragment in {*map(anchor, headings), *named}, target


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert sorted(set(LINK.findall(contents)) & {page.name for page in DOCS} - {"README.md"}) == sorted(
        page.name for page in DOCS if page.name != "README.md"
    )


@pytest.mark.parametrize("page", [*PAGES, *CHINESE, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_of_the_project_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []
    pages = re.findall(r"(?<![\w/.(])(docs/[\w/]+\.md)", text)
    assert [path for path in pages if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_errors_are_shown_as_they_are(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines behind `$ python -m glmtuner …` are what that command prints; … stands for anything."""
    monkeypatch.chdir(tmp_path)
    for language, text in blocks(page):
        if language != "text" or not text.startswith("$ "):
            continue
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            line, _, shown = part.partition("\n")
            with redirect_stderr(io.StringIO()) as printed:
                assert main(shlex.split(line)[3:]) == 2
            wanted = ".*".join(map(re.escape, shown.strip().split("…")))
            assert re.fullmatch(wanted, printed.getvalue().strip()), printed.getvalue()
    assert list(tmp_path.iterdir()) == []
