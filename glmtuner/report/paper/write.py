"""`report FOLDER --paper en|zh`: writes paper/ into the folder of a sweep or of a run.

Every file but the pictures begins with a line that holds the SHA-256 of the rest, so that what was edited by hand is noticed.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from glmtuner import __version__
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.report.jobs import read_job
from glmtuner.report.paper.document import commands, main_document, preamble
from glmtuner.report.paper.facts import collect
from glmtuner.report.paper.figures import FOLDER, Figures, draw_figures
from glmtuner.report.paper.latex import latex_text
from glmtuner.report.paper.references import registry
from glmtuner.report.paper.results import results_text
from glmtuner.report.paper.setup import assets_table, setup_text, unknowns
from glmtuner.report.paper.significance import against_the_best
from glmtuner.report.paper.words import LANGUAGES
from glmtuner.report.ranking import Ranking, rank_jobs, rank_sweep
from glmtuner.run_folder.files import write_bytes, write_text
from glmtuner.run_folder.folder import RunFolder

PAPER, MAIN = "paper", "main.tex"
PIECES = ("setup.tex", "results.tex", "figures.tex", "assets.tex", "references.bib", "preamble.tex", MAIN)
CITED = re.compile(r"\\cite\{([^}]+)\}")
FIRST_LINE = re.compile(r"% glmtuner \S+ report --paper (\w+), sha256 ([0-9a-f]{64})\n")
PICTURE = re.compile(rf"{FOLDER}/([\w-]+\.pdf)")


def write_paper(path: Path, language: str) -> Path:
    """Write the paper of a sweep or a run, and say what is not known; returns its folder.

    `path` has been found to be a sweep or a run. Raises ConfigError for pieces that were edited by hand since: main.tex alone
    is kept then, in the language that it has.
    """
    words, folder = LANGUAGES[language], path / PAPER
    kept = _edited(folder, language)
    is_run = RunFolder(path).is_run
    ranking = rank_run(path) if is_run else rank_sweep(path)
    known = registry()
    facts, p_values = collect(ranking, known), against_the_best(ranking)
    figures = draw_figures(ranking, is_run, words)
    pieces = {
        "setup.tex": setup_text(ranking, facts, len(p_values), known, words),
        "results.tex": _noted(ranking.notes) + results_text(ranking, p_values, figures.labels, words),
        "figures.tex": figures.tex,
        "assets.tex": assets_table(facts, known, words),
    }
    cited = {key for text in pieces.values() for keys in CITED.findall(text) for key in keys.split(",")}
    pieces |= {"references.bib": known.bibtex(cited), "preamble.tex": preamble(words)}
    title = latex_text(path.resolve().name, words.chinese)
    pieces[MAIN] = main_document(title, bool(cited), words)
    _write(folder, {name: text for name, text in pieces.items() if name not in kept}, figures, language)
    for name in kept:
        say(f"{folder / name} was edited by hand, and is kept; what it \\inputs is new")
    notes = ranking.notes if is_run else []  # a sweep's report has printed them
    for sentence in (*notes, *facts.unreadable, *unknowns(facts), *figures.notes):
        say(sentence)
    say(f"paper: {folder / MAIN}; compile it in its folder: {commands(words)}")
    return folder


def rank_run(path: Path) -> Ranking:
    """The ranking of a single run; raises CheckpointError if the folder disappears."""
    job = read_job(RunFolder(path))
    if job is None:
        raise CheckpointError(f"{path} was removed while it was read")
    return rank_jobs(path, [job])


def _noted(notes: list[str]) -> str:
    """The report's notes as comments."""
    return "".join(f"% {' '.join(note.split())}\n" for note in notes)


def _edited(folder: Path, language: str) -> list[str]:
    """The files of the paper that were edited by hand and are kept: main.tex at most; raises ConfigError for others."""
    edited = [name for name in PIECES if _is_edited(folder / name)]
    if MAIN in edited and (found := _language_of(folder / MAIN)) not in (None, language):
        raise ConfigError(
            f"--paper {language}: {folder / MAIN} was edited by hand, and is in the other language; type --paper {found}, or move "
            "it away and type the same command again"
        )
    if others := [name for name in edited if name != MAIN]:
        raise ConfigError(
            f"--paper {language}: {', '.join(str(folder / name) for name in others)} {'was' if len(others) == 1 else 'were'} edited "
            "by hand, and would be overwritten; copy what you wrote into main.tex, or into a file of your own, remove "
            f"{'it' if len(others) == 1 else 'them'}, and type the same command again"
        )
    return edited


def _write(folder: Path, pieces: Mapping[str, str], figures: Figures, language: str) -> None:
    """Write the files and the pictures; pictures of an earlier paper that this one lacks are removed."""
    for name in {*PICTURE.findall(_read(folder / "figures.tex"))} - figures.files.keys():
        (folder / FOLDER / name).unlink(missing_ok=True)
    for name, picture in figures.files.items():
        write_bytes(folder / FOLDER / name, picture)
    for name, text in pieces.items():
        write_text(folder / name, f"% glmtuner {__version__} report --paper {language}, sha256 {_hash(text)}\n{text}")


def _is_edited(path: Path) -> bool:
    """Whether the file exists and is not as glmtuner wrote it."""
    text = _read(path)
    written = FIRST_LINE.match(text)
    return path.exists() and (written is None or written[2] != _hash(text[written.end() :]))


def _language_of(path: Path) -> str | None:
    written = FIRST_LINE.match(_read(path))
    return written[1] if written else None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
