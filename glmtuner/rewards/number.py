"""The label's number."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.rewards import Reward, Sampled
from glmtuner.templates.rendering import split_reasoning

MINUS = str.maketrans(
    dict.fromkeys("\u2212\ufe63\u2010\u2011", "-")
)  # NFKC leaves the first, a minus sign, and hyphens
UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
DIGITS = {**{digit: value for value, digit in enumerate("零一二三四五六七八九")}, "〇": 0, "两": 2}
MOST_DIGITS = 300  # of a number: the arithmetic of longer ones takes long, and Python refuses to read those of 4,300
PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?"
SIGN = r"(?:(?<![\w)\]}.])[-+](?=\S)|负\s?)?"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})(?:"
    rf"\\[dt]?frac\s*\{{\s*(?P<latex_sign>-?)(?P<over>{PLAIN})\s*\}}\s*\{{\s*(?P<under>{PLAIN})\s*\}}"
    rf"|(?P<parts>{PLAIN})\s*分之\s*(?P<of>{PLAIN})"
    rf"|(?:(?P<whole>\d+)\s)?(?P<numerator>{PLAIN})\s?/\s?(?P<denominator>{PLAIN})"
    rf"|(?P<plain>{PLAIN}|(?<!\d)\.\d+)(?P<unit>[百千万亿]+)?"
    r")"
)
NUMERAL = "[零〇一二两三四五六七八九十百千万亿]"
CHINESE = re.compile(rf"(?P<sign>负?)\s?(?P<number>{NUMERAL}++)(?:点(?P<decimals>[零〇一二三四五六七八九]++))?")
CHINESE_FRACTION = re.compile(rf"(?:(负)\s?|(?<!{NUMERAL}))({NUMERAL}++)分之({NUMERAL}++)")


@preset("reward", "number")
@dataclass(kw_only=True)
class Number(Reward):
    """1 for an answer whose last number is the label's last number, 0 for others; thoughts are left out.

    Read are 1234, 1,234, -3.50, 2.5e3, 3/4, 1 1/2, \\frac{3}{4}, 3分之2, 1.2万 and their full-width forms; where there are none of
    these, 一千二百三十四, 三点五 and 四分之三. A sign such as % is a unit and is not read.

    tolerance: the largest difference at which two numbers are the same.
    """

    tolerance: float = 0.0

    reads_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_ranges(("tolerance", self.tolerance >= 0, "0 or more"))

    def label_problem(self, label: str) -> str | None:
        return "holds no number" if last_number(split_reasoning(label)[1]) is None else None

    def score(self, sampled: Sampled) -> float:
        answer, label = (last_number(split_reasoning(text)[1]) for text in (sampled.answer, sampled.label))
        if answer is None or label is None:
            return 0.0
        return float(abs(answer - label) <= Fraction(self.tolerance))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where there is none, or one of too many digits, or a division by 0."""
    # NFKC writes a character such as ½ with digits, which would continue those before it
    text = "".join(f" {each}" if "\u2044" in unicodedata.normalize("NFKC", each) else each for each in text)
    text = unicodedata.normalize("NFKC", text).translate(MINUS).replace("\u2044", "/")
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return _last_chinese(text)
    last = numbers[-1]
    return _value(last) if len(last.group()) <= MOST_DIGITS else None


def _value(found: re.Match[str]) -> Fraction | None:
    sign = -1 if found["sign"].strip() in ("-", "负") else 1
    over, under = (
        found["over"] or found["of"] or found["numerator"],
        found["under"] or found["parts"] or found["denominator"],
    )
    if over:
        below = _plain(under)
        if not below:
            return None
        value = int(found["whole"] or 0) + _plain(over) / below
        return sign * value * (-1 if found["latex_sign"] else 1)
    value = _plain(found["plain"])
    for unit in found["unit"] or "":
        value *= UNITS[unit]
    return sign * value


def _plain(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _last_chinese(text: str) -> Fraction | None:
    fractions = list(CHINESE_FRACTION.finditer(text))
    numbers = list(CHINESE.finditer(text))
    if not numbers or len(numbers[-1].group()) > MOST_DIGITS:
        return None
    if fractions and fractions[-1].end() >= numbers[-1].end():
        sign, under, over = fractions[-1].groups()
        if len(under) > MOST_DIGITS:
            return None
        below = _chinese(under)
        return Fraction(-_chinese(over) if sign else _chinese(over), below) if below else None
    last = numbers[-1]
    value = Fraction(_chinese(last["number"]))
    if last["decimals"]:
        value += Fraction("0." + "".join(str(DIGITS[digit]) for digit in last["decimals"]))
    return -value if last["sign"] else value


def _chinese(numeral: str) -> int:
    """一千二百三十四 is 1234, 二〇二六 is 2026, 十二 is 12."""
    if not any(character in UNITS for character in numeral):
        return int("".join(str(DIGITS[digit]) for digit in numeral))
    total = section = digit = 0
    for character in numeral:
        if character in DIGITS:
            digit = DIGITS[character]
        elif UNITS[character] < 10**4:
            section += (digit or (1 if character == "十" else 0)) * UNITS[character]
            digit = 0
        else:
            total = (total + section + digit) * UNITS[character]
            section = digit = 0
    return total + section + digit
