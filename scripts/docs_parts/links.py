"""The built pages: each link, anchor and picture exists, and a browser loads nothing from elsewhere."""

import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

REMOTE = re.compile(r"(?:\w+:)?//")
LOADED_LINKS = ("stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest")
CSS_URL = re.compile(r"url\(\s*['\"]?(?!data:)((?:\w+:)?//[^)'\"]+)|@import\s+['\"]([^'\"]+)")


@dataclass
class Html(HTMLParser):
    """What a page has: its anchors, its links, and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if name := found.get("id"):
            (self.doubled if name in self.anchors else []).append(name)
            self.anchors.add(name)
        if tag == "link":
            (self.loaded if found.get("rel") in LOADED_LINKS else self.links).append(found.get("href", ""))
        elif tag in ("a", "area") and "href" in found:
            self.links.append(found["href"])
        if "src" in found:
            self.loaded.append(found["src"])
        self.loaded += [part.split()[0] for part in found.get("srcset", "").split(",") if part.strip()]


@cache
def parsed(file: Path) -> Html:
    """A page of the site."""
    page = Html()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def problems(site: Path) -> list[str]:
    """A line for each thing that is wrong in the built site."""
    parsed.cache_clear()
    found = []
    for file in sorted(site.rglob("*.html")):
        page, name = parsed(file), file.relative_to(site)
        found += [f"{name}: two anchors are #{anchor}" for anchor in page.doubled]
        for target in page.loaded:
            if REMOTE.match(target):
                found.append(f"{name}: loads {target}")
            elif told := dead(file, target, site):
                found.append(f"{name}: {told}")
        found += [f"{name}: {told}" for target in page.links if (told := dead(file, target, site))]
    for file in sorted(site.rglob("*.css")):
        for match in CSS_URL.finditer(file.read_text(encoding="utf-8")):
            found.append(f"{file.relative_to(site)}: loads {match[1] or match[2]}")
    return list(dict.fromkeys(found))


def dead(file: Path, target: str, site: Path) -> str:
    """Why a link of a page leads nowhere; empty where it leads somewhere, or out of the site."""
    if REMOTE.match(target) or re.match(r"(mailto|data|javascript):", target):
        return ""
    path, _, anchor = target.partition("#")
    there = (file.parent / unquote(path.partition("?")[0])).resolve() if path else file
    if not there.is_file():
        return f"{target} does not exist"
    if not there.is_relative_to(site.resolve()):
        return f"{target} is outside of the site"
    if anchor and there.suffix == ".html" and unquote(anchor) not in parsed(there).anchors:
        return f"{target}: there is no such anchor"
    return ""
