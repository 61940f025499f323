"""Build the documentation's site: docs/ in English and Chinese, the reference of keys, commands and model presets, and a search.

`make docs` calls it. The pages are first written as the site's Markdown into build/docs/, from where zensical makes HTML; what is dead or
missing fails: a link, an anchor, a picture, a key without a meaning, a key that pages name and that is not there, a page that no table of
docs/README.md names, and whatever a browser would load from elsewhere. The site opens from a folder, without a server.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from docs_parts import links, reference, tables  # noqa: E402
from docs_parts.pages import CONTENTS, HOME, LANGUAGES, LINK, DocsError, Page, Pages, parts, plain  # noqa: E402

from glmtuner.launch.register import register_presets  # noqa: E402
from glmtuner.sweep.launchers import register as register_launchers  # noqa: E402

THEME = ROOT / "scripts/docs_parts/theme"
WORDS = {
    "en": {
        "description": "Fine-tunes ChatGLM, GLM and other causal language models from composed YAML", "home": "Overview",
        "reference": "Reference", "light": "light", "dark": "dark", "project": "The project", "contents": "All pages",
    },
    "zh": {
        "description": "用可组合的 YAML 配置微调 ChatGLM、GLM 和其他因果语言模型", "home": "概览", "reference": "参考",
        "light": "浅色", "dark": "深色", "project": "项目", "contents": "全部页面",
    },
}  # fmt: skip
SEPARATOR = r"""[\s\-,:!=\[\]()\\"`/、。，：；？！（）“”]+|\.(?!\d)"""  # zensical's own without `_`, so that lora_rank is one word
COLOUR = re.compile(r"\x1b\[[\d;]*m")
START = """<!doctype html>
<meta charset="utf-8">
<title>glmtuner</title>
<script>location.replace((navigator.language || "").startsWith("zh") ? "zh/index.html" : "en/index.html")</script>
<p><a href="en/index.html">English</a> · <a lang="zh" href="zh/index.html">中文</a></p>
"""


def staged(root: Path, folder: Path, language: str) -> list[Page]:
    """Write the Markdown of a language and its configuration into a folder; returns the pages, raises DocsError with all that is wrong."""
    wrong: list[str] = []

    def found(make: Callable[[], list[Page]]) -> list[Page]:
        try:
            return make()
        except DocsError as error:
            wrong.extend(str(error).splitlines())
            return []

    keys = reference.keys_of(language)
    groups = frozenset(group for group in reference.GROUPS if "." not in group) | {"hydra"}
    pages = Pages(root, language, reference.places(keys), groups)
    own = found(pages.all)
    made = [
        *found(lambda: reference.reference(language, root / "conf", keys)),
        *found(lambda: [tables.models_page(language, root)]),
        tables.commands_page(language),
    ]
    contents = next((page for page in own if page.name == CONTENTS), None)
    nav: list[dict[str, Any]] = []
    if contents is not None:
        try:
            nav = navigation(language, contents, own, made)
        except DocsError as error:
            wrong.extend(str(error).splitlines())
    if wrong:
        raise DocsError("\n".join(wrong))
    docs = folder / "docs"
    for page in (*own, *made):
        path = docs / page.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.text, encoding="utf-8")
    for name, file in pages.copied.items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, docs / name)
    shutil.copytree(THEME / "assets", docs / "assets")
    config = yaml.safe_dump(configuration(language, nav), allow_unicode=True, sort_keys=False)
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")
    return [*own, *made]


def navigation(language: str, contents: Page, own: list[Page], made: list[Page]) -> list[dict[str, Any]]:
    """The sections and pages of docs/README.md, in its order, and behind them what is generated; raises DocsError for a page that is left."""
    words = WORDS[language]
    titles = {page.name: page.title for page in (*own, *made)}
    sections: list[tuple[str, list[str]]] = []
    prose = "".join(text for is_code, text in parts(contents.text) if not is_code)
    for line in prose.splitlines():
        if line.startswith("## "):
            sections.append((plain(re.sub(r" \{#.*", "", line[3:])), []))
        elif sections and line.startswith("|"):
            names = [target.partition("#")[0] for _, _, target in LINK.findall(line)]
            sections[-1][1].extend(name for name in names if name in titles)
    last = [CONTENTS, *(name for name in ("contributing.md", "changelog.md") if name in titles)]
    listed = {name for _, names in sections for name in names}
    if missing := sorted({page.name for page in own} - listed - {HOME, *last}):
        raise DocsError(
            "\n".join(f"docs/{name} is in no table below a heading of docs/README.md: add a row" for name in missing)
        )
    found: list[dict[str, Any]] = [{words["home"]: HOME}]
    found += [{title: [{titles[name]: name} for name in dict.fromkeys(names)]} for title, names in sections]
    found.append({words["reference"]: [{page.title: page.name} for page in made]})
    found.append({words["project"]: [{words["contents"] if name == CONTENTS else titles[name]: name} for name in last]})
    return found


def configuration(language: str, nav: list[dict[str, Any]]) -> dict[str, Any]:
    """zensical's configuration of a language."""
    words = WORDS[language]
    (other,) = LANGUAGES.keys() - {language}
    palette = [
        {"scheme": "default", "media": "(prefers-color-scheme: light)", "toggle": {"icon": "lucide/moon", "name": words["dark"]}},
        {"scheme": "slate", "media": "(prefers-color-scheme: dark)", "toggle": {"icon": "lucide/sun", "name": words["light"]}},
    ]  # fmt: skip
    return {
        "site_name": "glmtuner", "site_description": words["description"], "use_directory_urls": False, "docs_dir": "docs",
        "site_dir": "site", "nav": nav,
        "theme": {
            "name": "material", "language": language, "font": False, "custom_dir": str(THEME), "palette": palette,
            "icon": {"logo": "lucide/book-open"},
            "features": ["navigation.footer", "navigation.top", "navigation.sections", "content.code.copy", "search.highlight", "toc.follow"],
        },
        "plugins": [{"search": {"separator": SEPARATOR}}, "offline"],
        "extra": {
            "alternate": True,  # shows our switch; a list would have each page look for a sitemap, which a file may not
            "languages": [{"name": LANGUAGES[other], "lang": other}],
        },
        "markdown_extensions": [
            {"toc": {"permalink": True}}, "tables", "attr_list", "admonition", "md_in_html", "sane_lists", "pymdownx.superfences",
            {"pymdownx.highlight": {"use_pygments": True}},
        ],
    }  # fmt: skip


def build(root: Path, site: Path, work: Path) -> list[str]:
    """Build the site of a checkout; returns what is to be said, and raises DocsError for what is wrong."""
    register_presets()
    register_launchers()
    shutil.rmtree(work, ignore_errors=True)
    told, wrong = [], []
    for language in LANGUAGES:
        folder = work / language
        try:
            pages = staged(root, folder, language)
        except DocsError as error:
            wrong += str(error).splitlines()
            continue
        english = [page.name for page in pages if not page.is_translated]
        told.append(
            f"{language}: {len(pages)} pages"
            + (f", {len(english)} of them in English: {', '.join(english)}" if english else "")
        )
    if wrong:
        raise DocsError("\n".join(dict.fromkeys(wrong)))
    made = work / "site"
    made.mkdir()
    if wrong := [line for language in LANGUAGES for line in run_zensical(work / language)]:
        raise DocsError("\n".join(wrong))
    for language in LANGUAGES:
        shutil.move(work / language / "site", made / language)
        (made / language / "404.html").unlink()  # of servers, with addresses from the root
    (made / "index.html").write_text(START, encoding="utf-8")
    if wrong := links.problems(made):
        raise DocsError("\n".join(wrong))
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(made, site)
    return told


def run_zensical(folder: Path) -> list[str]:
    """Make HTML of a folder's Markdown; returns zensical's own words where it warns."""
    command = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--strict",
        "--clean",
        "--config-file",
        str(folder / "mkdocs.yml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if not done.returncode:
        return []
    told = COLOUR.sub("", done.stdout + done.stderr)
    return [f"{folder.name}:", *(told.partition("Traceback")[0] or told).strip().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "site", help="where the site is written; site/ by default")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose pages are built")
    asked = parser.parse_args()
    if find_spec("zensical") is None:
        print("zensical, which makes the HTML, is not installed here: type make docs", file=sys.stderr)
        return 2
    site = asked.to.resolve()
    if site.exists() and not (site / "en/index.html").is_file() and any(site.iterdir()):
        print(f"--to {asked.to}: the folder has files that no site has; name an empty or a new one", file=sys.stderr)
        return 2
    try:
        told = build(asked.root.resolve(), site, site.with_name(f".{site.name}.build"))
    except DocsError as error:
        print(error, file=sys.stderr)
        print("the site is not built: see above", file=sys.stderr)
        return 1
    print(*told, f"open {asked.to / 'index.html'}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
