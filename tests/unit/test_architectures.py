"""docs/architectures.md says what the matrix expects, and that is what the project promises."""

import json
import re

import matrix
from zoo import ARCHITECTURES

EXPECTED: dict[str, dict[str, str]] = json.loads(matrix.EXPECTED.read_text(encoding="utf-8"))


def count(cell: str) -> int:
    return sum(found[cell] == matrix.OK for found in EXPECTED.values())


def test_the_page_is_what_is_expected() -> None:
    page = matrix.PAGE.read_text(encoding="utf-8")
    found = re.search(r"with (.+) on a CPU", page)
    assert found and matrix.page(EXPECTED, found.group(1)) == page
    assert matrix.page(EXPECTED, found.group(1), "zh") == matrix.CHINESE_PAGE.read_text(encoding="utf-8")
    assert [*EXPECTED] == [*ARCHITECTURES]


def test_nothing_that_is_expected_is_wrong() -> None:
    told = {text for found in EXPECTED.values() for text in found.values()} - {matrix.OK}
    assert all(text.startswith(matrix.REFUSED) for text in told)
    assert all(len(found) == 15 for found in EXPECTED.values())


def test_most_architectures_do_what_users_need() -> None:
    """At least 55 of 60 are trained, predicted, resumed and exported, and 45 packed."""
    share = len(EXPECTED) / 60
    for cell in ("lora", "full", "predict", "resume", "export"):
        assert count(cell) >= 55 * share, cell
    assert count("packing") >= 45 * share
