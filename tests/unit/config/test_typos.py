"""A hundred random single-character typos: each is answered with the word that was meant, and nothing is written."""

import random
import re
import string

import pytest

from glmtuner.cli.main import main
from glmtuner.config.compose import presets
from glmtuner.config.overrides import MOVED
from glmtuner.config.paths import conf_dir
from glmtuner.config.schema import legal_keys
from glmtuner.launch.register import register_presets

register_presets()

LEGAL = sorted({*legal_keys(), *presets([conf_dir()])})
WORDS = [word for word in LEGAL if word not in MOVED]  # what may be typed
LETTERS = string.ascii_lowercase + "_"


def edits(one: str, other: str) -> int:
    """Inserted, dropped, replaced and swapped characters between two words (optimal string alignment)."""
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            least = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                least = min(least, rows[-2][j - 2] + 1)
            row.append(least)
        rows.append(row)
    return rows[-1][-1]


def typo(word: str, draw: random.Random) -> str:
    """The word with one character inserted, dropped, replaced, or swapped with its neighbour."""
    at = draw.randrange(len(word))
    letter = draw.choice(LETTERS)
    return draw.choice(
        [
            word[:at] + letter + word[at:],
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at + 1 :],
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
        ]
    )


def meant(typed: str) -> list[str]:
    """The legal words with the fewest edits."""
    counts = {word: edits(typed, word) for word in LEGAL if abs(len(word) - len(typed)) < 2}
    return [word for word, count in counts.items() if count == min(counts.values())]


def wrong_part(typed: str, word: str) -> str:
    """The part between dots that was mistyped; the whole word when a dot itself was."""
    pairs = list(zip(typed.split("."), word.split("."), strict=False))
    wrong = [right for got, right in pairs if got != right]
    return wrong[0] if typed.count(".") == word.count(".") and len(wrong) == 1 else word


def typos(count: int, seed: int) -> list[tuple[str, str]]:
    """(typed, meant): typos that are no legal word by chance and have one nearest word."""
    draw = random.Random(seed)
    leaves = {word.rpartition(".")[2] for word in LEGAL}
    found: list[tuple[str, str]] = []
    while len(found) < count:
        word = draw.choice(WORDS)
        typed = typo(word, draw)
        readable = re.fullmatch(r"[a-z_]\w*(\.[a-z_]\w*)*", typed)
        if readable and typed not in {*LEGAL, *MOVED, *leaves} and meant(typed) == [word]:
            found.append((typed, word))
    return found


def test_edits_are_counted_right():
    assert [edits("lora", other) for other in ("lora", "lra", "loora", "lorb", "lroa", "")] == [0, 1, 1, 1, 1, 4]
    assert edits("ca", "abc") == 3  # a swapped pair is not edited again


@pytest.mark.parametrize(("typed", "word"), typos(100, seed=0))
def test_a_typo_is_answered_with_the_word(typed, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([f"{typed}=1"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(f"glmtuner: unknown key '{typed}'; did you mean ")
    first = re.search(r"did you mean '([^']+)'", told.err)
    assert first and first.group(1) == wrong_part(typed, word)
    assert f"type {word}=…" in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_new_key_of_a_free_dictionary_takes_a_plus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "-m",
        "model=tiny_glm",
        "tracker=none",
        "data.dataset=belle_sample",
        "trainer.seed=1,2",
        "hydra/launcher=slurm",
    ]
    key = "hydra.launcher.additional_parameters.hold"
    assert main([*words, f"{key}=true"]) == 2
    assert (
        capsys.readouterr().err == f"glmtuner: {key}: a key that is new in a dictionary takes a plus; type +{key}=…\n"
    )
