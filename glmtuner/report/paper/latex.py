"""Texts of users, data sets and models as LaTeX that shows them as they are, and tables of them.

What a plain LaTeX has no character for is shown by its code point, `[U+1F600]`: never left out, and never an error.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from glmtuner.report.escape import one_line

# Also what LaTeX reads as something else in some place: a bracket or an asterisk behind `\\`, ligatures of quotes and question marks.
_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_\allowbreak{}", "/": r"/\allowbreak{}",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}", "*": "{*}",
}  # fmt: skip
_LIGATURES = "-,"  # two of which become another sign
# Characters outside of Latin-1 for which every LaTeX has a command.
_COMMANDS = {
    "–": "--", "—": "---", "‘": "`", "’": "'", "“": "``", "”": "''", "„": r"\quotedblbase{}", "‚": r"\quotesinglbase{}",
    "…": r"\ldots{}", "•": r"\textbullet{}", "†": r"\dag{}", "‡": r"\ddag{}", "™": r"\texttrademark{}", "€": r"\texteuro{}",
    "«": r"\guillemotleft{}", "»": r"\guillemotright{}", "°": r"\textdegree{}",
    **{sign: rf"\ensuremath{{{command}}}" for sign, command in {
        "×": r"\times", "÷": r"\div", "±": r"\pm", "·": r"\cdot", "−": "-", "≈": r"\approx", "≠": r"\neq", "≤": r"\leq",
        "≥": r"\geq", "→": r"\to", "←": r"\leftarrow", "↔": r"\leftrightarrow", "⇒": r"\Rightarrow", "∞": r"\infty", "√": r"\surd",
        "∑": r"\sum", "∏": r"\prod", "∂": r"\partial", "∇": r"\nabla", "∈": r"\in", "∀": r"\forall", "∃": r"\exists", "¬": r"\lnot",
        "µ": r"\mu", "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\epsilon", "ζ": r"\zeta", "η": r"\eta",
        "θ": r"\theta", "ι": r"\iota", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "ν": r"\nu", "ξ": r"\xi", "π": r"\pi",
        "ρ": r"\rho", "σ": r"\sigma", "ς": r"\varsigma", "τ": r"\tau", "υ": r"\upsilon", "φ": r"\phi", "χ": r"\chi", "ψ": r"\psi",
        "ω": r"\omega", "Γ": r"\Gamma", "Δ": r"\Delta", "Θ": r"\Theta", "Λ": r"\Lambda", "Ξ": r"\Xi", "Π": r"\Pi", "Σ": r"\Sigma",
        "Φ": r"\Phi", "Ψ": r"\Psi", "Ω": r"\Omega", "¹": "^1", "²": "^2", "³": "^3",
    }.items()},
}  # fmt: skip
# Of Latin-1 and Latin Extended-A, what the T1 encoding lacks; letters with an accent it composes.
_NOT_IN_T1 = {*"ĦħĸĿŀŉŊŋŦŧſ¢¤¥¦§¨©ª¬®¯´¶¸º¼½¾", "\xa0", "\xad"}
_IN_TS1 = {
    "§": r"\S{}", "©": r"\copyright{}", "®": r"\textregistered{}", "¶": r"\P{}", "¥": r"\textyen{}", "¢": r"\textcent{}",
}  # fmt: skip


def latex_text(text: str, chinese: bool = False) -> str:
    r"""The text on one line of LaTeX, which shows it as it is.

    In a `chinese` document Chinese characters stand as they are; in another one they stand in `\glmtunerCJK{…}{…}`, whose second
    argument is their code points, for a LaTeX without a Chinese font (see preamble.tex).
    """
    parts: list[str] = []
    waiting = ""  # Chinese characters in a row
    shown = unicodedata.normalize("NFC", one_line(text))
    for place, sign in enumerate(shown):
        if is_chinese(sign):
            waiting += sign
            continue
        if waiting:
            parts.append(_chinese(waiting, chinese))
            waiting = ""
        parts.append(_sign(sign))
        if sign in _LIGATURES and shown[place + 1 : place + 2] == sign:
            parts.append("{}")
    return "".join([*parts, _chinese(waiting, chinese)] if waiting else parts)


def is_chinese(sign: str) -> bool:
    """Whether the character is in GB 2312 and in no Latin alphabet: what every Chinese font of a LaTeX has."""
    if sign < "\u2e80":  # letters, digits and signs that LaTeX has itself
        return False
    try:
        return len(sign.encode("gb2312")) == 2
    except UnicodeEncodeError:
        return False


def _chinese(signs: str, chinese: bool) -> str:
    return signs if chinese else rf"\glmtunerCJK{{{signs}}}{{{' '.join(map(_code_point, signs))}}}"


def _sign(sign: str) -> str:
    if sign in _SPECIAL:
        return _SPECIAL[sign]
    if sign.isascii():
        return sign if sign.isprintable() else _code(sign)
    if sign in _COMMANDS or sign in _IN_TS1:
        return _COMMANDS.get(sign) or _IN_TS1[sign]
    return sign if sign < "\u0180" and sign.isprintable() and sign not in _NOT_IN_T1 else _code(sign)


def _code_point(sign: str) -> str:
    return f"U+{ord(sign):04X}"


def _code(sign: str) -> str:
    return f"{{[}}{_code_point(sign)}{{]}}"


@dataclass(frozen=True)
class Tex:
    """A text that is LaTeX already."""

    text: str


Cell = str | Tex


def cell(content: Cell, chinese: bool) -> str:
    """The LaTeX of a table's cell."""
    return content.text if isinstance(content, Tex) else latex_text(content, chinese)


MOST_LINES = 40  # of a table on one page


def table(
    header: Sequence[Cell],
    rows: Sequence[Sequence[Cell]],
    *,
    label: str,
    caption: str,
    columns: str,
    chinese: bool,
    continued: str,
    note: str = "",
    rules_before: Sequence[int] = (),
) -> str:
    r"""A table between rules of booktabs, not wider than the text, with its caption above and a `note` below.

    `caption`, `continued` (behind the caption of all but the first of a table that needs several pages) and `note` are LaTeX;
    `columns` are the letters of tabular; before the rows `rules_before` stands a thin rule.
    """
    lines: list[str] = []
    for start in range(0, max(len(rows), 1), MOST_LINES):
        name = label if start == 0 else f"{label}-{start // MOST_LINES + 1}"
        lines += [r"\begin{table}[htbp]", r"\centering", rf"\caption{{{caption}{continued if start else ''}}}"]
        lines += [
            rf"\label{{tab:{name}}}",
            r"\glmtunerfit{%",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
        ]
        lines += [_line(header, chinese), r"\midrule"]
        for number, row in enumerate(rows[start : start + MOST_LINES], start):
            lines += [r"\midrule"] if number in rules_before and number > start else []
            lines.append(_line(row, chinese))
        lines += [r"\bottomrule", r"\end{tabular}}"]
        lines += [rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {note}}}"] if note else []
        lines += [r"\end{table}", ""]
    return "\n".join(lines)


def _line(cells: Sequence[Cell], chinese: bool) -> str:
    return " & ".join(cell(content, chinese) for content in cells) + r" \\"
