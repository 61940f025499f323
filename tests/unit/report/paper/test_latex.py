"""Texts in LaTeX: nothing in them is a command, a group, mathematics or a comment, and no character is lost."""

import re

import pytest

from glmtuner.report.paper.latex import MOST_LINES, Tex, latex_text, table

COMMANDS = {  # those that the escaping may write, all of them without effects on what follows
    "textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textbar", "textquotedbl", "textquotesingle",
    "textasciigrave", "ensuremath", "ldots", "glmtunerCJK", "allowbreak", "alpha", "to", "leq", "approx", "times", "pm", "copyright",
    "S", "texteuro",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("100 % of $5 & #1_a", r"100 \% of \$5 \& \#1\_\allowbreak{}a"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/\allowbreak{}etc/\allowbreak{}passwd\}"),
        ("a^2 ~b <c> |d|", r"a\textasciicircum{}2 \textasciitilde{}b \textless{}c\textgreater{} \textbar{}d\textbar{}"),
        ("\"q\" 'r' `s`", r"\textquotedbl{}q\textquotedbl{} \textquotesingle{}r\textquotesingle{} \textasciigrave{}s\textasciigrave{}"),
        ("--x ---y ,,z", "-{}-x -{}-{}-y ,{},z"),
        ("[1] *", "{[}1{]} {*}"),
        ("Müller Łódź naïve", "Müller Łódź naïve"),
        ("e\u0301", "é"),  # composed
        ("α → 1 ≤ 2 ≈ ±3 × … €", r"\ensuremath{\alpha} \ensuremath{\to} 1 \ensuremath{\leq} 2 \ensuremath{\approx} \ensuremath{\pm}3 "
         r"\ensuremath{\times} \ldots{} \texteuro{}"),
        ("ok 😀", "ok {[}U+1F600{]}"),
        ("a\u200bb\ufeffc", "a{[}U+200B{]}b{[}U+FEFF{]}c"),
        ("Привет", "{[}U+041F{]}{[}U+0440{]}{[}U+0438{]}{[}U+0432{]}{[}U+0435{]}{[}U+0442{]}"),
        ("\x1b[31m\x00", r"\textbackslash{}x1b{[}31m\textbackslash{}x00"),
        ("\u202eevil", r"\textbackslash{}u202eevil"),
        ("two\n\n  lines\ttab", "two lines tab"),  # an empty line would end the paragraph
        ("x你好y", r"x\glmtunerCJK{你好}{U+4F60 U+597D}y"),
        ("你好", r"\glmtunerCJK{你好}{U+4F60 U+597D}"),
        ("㐀", "{[}U+3400{]}"),  # in no font of GB 2312
        ("", ""),
    ],
)  # fmt: skip
def test_each_character_is_shown_as_it_is(text, latex):
    assert latex_text(text) == latex


def test_chinese_stands_as_it_is_in_a_chinese_document():
    assert latex_text("学习率 50%，好。", chinese=True) == r"学习率 50\%，好。"
    assert latex_text("a😀", chinese=True) == "a{[}U+1F600{]}"


HOSTILE = [
    r"\end{document}", r"\\[9cm]", r"\catcode`\@=11 \def\x{\x}\x", r"}{\input|ls", "$$E=mc^2$$", r"^^5cinput{x}", "% comment",
    "&&& \\\\ \\hline", r"\write18{rm -rf /}", "#1 ##", "~~~", "}}}}{{{{", r"\verb|x|", "\x00\x01\x1f\x7f\x85\u2028\u2029",
    "\ud800", "\U0001f469\u200d\U0001f680", "{[}", "-" * 9, "“”‘’", "\\", "_" * 3, "𝔘𝔫𝔦", "ا ب", "\u0336x\u0336",
]  # fmt: skip


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("text", [*HOSTILE, "".join(map(chr, range(0x250))), "".join(map(chr, range(0x2000, 0x2300)))])
def test_a_hostile_text_has_no_effect(text, chinese):
    latex = latex_text(text, chinese)
    bare = re.sub(r"\\[&%$#_{}]", "", latex)  # escaped signs
    assert {name for name in re.findall(r"\\([a-zA-Z]+)", bare)} <= COMMANDS | set(re.findall(r"\\ensuremath\{\\(\w+)\}", bare)) | {
        "textbullet", "dag", "ddag", "texttrademark", "quotedblbase", "quotesinglbase", "guillemotleft", "guillemotright", "textdegree",
        "textregistered", "P", "textyen", "textcent",
    }  # fmt: skip
    assert not re.search(r"\\[^a-zA-Z]", bare), "a control symbol"
    assert not re.search(r"[%#&$~]", re.sub(r"\\ensuremath\{\^\d\}", "", bare)) and "^" not in re.sub(
        r"\{\^\d\}", "", bare
    )
    depth = 0
    for sign in bare:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0 and "\n" not in latex
    assert not re.search("[\x00-\x1f\x7f-\x9f]", latex)


def made(rows, **more):
    return table(
        ["a", "b"], rows, label="x", caption="C", columns="lr", chinese=False, continued=" (continued)", **more
    )


def test_a_table_has_rules_and_escaped_cells():
    text = made([["50%", Tex(r"$\pm$ 1")], ["c_d", "2"]], note="N", rules_before=[1])
    assert text.count(r"\midrule") == 2 and r"50\% & $\pm$ 1 \\" in text and r"c\_\allowbreak{}d & 2 \\" in text
    order = [text.index(part) for part in (r"\caption{C}", r"\label{tab:x}", r"\toprule", r"\bottomrule", "N")]
    assert order == sorted(order)


def test_a_long_table_continues_on_the_next_page_and_loses_no_row():
    rows = [[str(number), "v"] for number in range(2 * MOST_LINES + 1)]
    text = made(rows)
    assert text.count(r"\begin{table}") == 3 and text.count("C (continued)") == 2
    assert re.findall(r"^(\d+) & v", text, re.MULTILINE) == [cells[0] for cells in rows]
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert labels == ["tab:x", "tab:x-2", "tab:x-3"]
