"""The LaTeX around the pieces of a paper: preamble.tex, which they need wherever they are \\input, and main.tex."""

from glmtuner.report.paper.words import Words

ENGLISH_CJK = r"""\newif\ifglmtunerCJK
\ifdefined\XeTeXversion\else\ifdefined\directlua\else
  \usepackage[T1]{fontenc}
  \IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
  \IfFileExists{CJKutf8.sty}{\IfFileExists{c70gbsn.fd}{\usepackage{CJKutf8}\glmtunerCJKtrue}{}}{}
\fi\fi
\usepackage{textcomp}
% Chinese characters, and their code points for a LaTeX without CJKutf8 and its font gbsn.
\ifglmtunerCJK
  \newcommand{\glmtunerCJK}[2]{\begin{CJK}{UTF8}{gbsn}#1\end{CJK}}
\else
  \newcommand{\glmtunerCJK}[2]{{\footnotesize[#2]}}
\fi
"""

# A Chinese document: ctex under XeLaTeX or LuaLaTeX, else CJKutf8 under pdfLaTeX; in words where neither is there.
CHINESE_CJK = r"""\newif\ifglmtunerunicode
\ifdefined\XeTeXversion\glmtunerunicodetrue\fi
\ifdefined\directlua\glmtunerunicodetrue\fi
\ifglmtunerunicode
  \IfFileExists{ctex.sty}{\usepackage[UTF8,scheme=plain]{ctex}}{%
    \PackageError{glmtuner}{This document needs the package ctex for Chinese}{Install ctex (in Debian: texlive-lang-chinese),
      or compile by pdflatex with the package CJKutf8.}}
  \tracinglostchars=2 % a character that the font lacks is named in the output of LaTeX
\else
  \usepackage[T1]{fontenc}
  \IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
  \IfFileExists{CJKutf8.sty}{%
    \usepackage{CJKutf8}
    \AtBeginDocument{\begin{CJK}{UTF8}{gbsn}}
    \AtEndDocument{\clearpage\end{CJK}}}{%
    \PackageError{glmtuner}{This document needs xelatex with the package ctex, or the package CJKutf8}{Type xelatex main.tex
      instead of pdflatex main.tex.}}
\fi
\usepackage{textcomp}
\AtBeginDocument{\renewcommand{\tablename}{表}\renewcommand{\figurename}{图}\renewcommand{\refname}{参考文献}}
\newcommand{\glmtunerCJK}[2]{#1}
"""

PREAMBLE = r"""% What the pieces beside this file need: \input it before \begin{document} of a document of your own.
% The folder of the pictures, with a slash at its end: \renewcommand it if the pieces are \input from another folder.
\providecommand{\glmtunerpath}{}
<CJK>\usepackage{booktabs}
\usepackage{graphicx}
\usepackage{url}
\newsavebox{\glmtunerbox}
% A table not wider than the text.
\newcommand{\glmtunerfit}[1]{\sbox{\glmtunerbox}{#1}%
  \ifdim\wd\glmtunerbox>\linewidth\resizebox{\linewidth}{!}{\usebox{\glmtunerbox}}\else\usebox{\glmtunerbox}\fi}
"""

MAIN = r"""% Compile by <COMMANDS>
\documentclass[11pt]{article}
\usepackage[a4paper,margin=2.4cm]{geometry}
\input{preamble}
\emergencystretch=4em % for words that cannot be divided, such as commits
\title{<TITLE>}
\author{}
\date{}
\begin{document}
\maketitle

\section{<SETUP>}
\input{setup}

\section{<RESULTS>}
\input{results}
\input{figures}

\section{<ASSETS>}
\input{assets}

<BIBLIOGRAPHY>\end{document}
"""


def engine(words: Words) -> str:
    """The program that compiles the document."""
    return "xelatex" if words.chinese else "pdflatex"


def commands(words: Words) -> str:
    """The commands that compile the document, in its folder."""
    return f"{engine(words)} main && bibtex main && {engine(words)} main && {engine(words)} main"


def preamble(words: Words) -> str:
    """The content of preamble.tex."""
    return PREAMBLE.replace("<CJK>", CHINESE_CJK if words.chinese else ENGLISH_CJK)


def main_document(title: str, has_references: bool, words: Words) -> str:
    """The content of main.tex; `title` is LaTeX."""
    bibliography = "\\clearpage\n\\bibliographystyle{plain}\n\\bibliography{references}\n" if has_references else ""
    filled = {
        "COMMANDS": commands(words), "TITLE": title, "SETUP": words.say("setup_section"), "RESULTS": words.say("results_section"),
        "ASSETS": words.say("assets_section"), "BIBLIOGRAPHY": bibliography,
    }  # fmt: skip
    text = MAIN
    for name, value in filled.items():
        text = text.replace(f"<{name}>", value)
    return text
