"""What a paper about some runs cites: the registry of glmtuner/assets/references.yaml, and its entries as BibTeX."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml

from glmtuner.config.paths import ASSETS
from glmtuner.report.jobs import comparable

REGISTRY = ASSETS / "references.yaml"
SET = "set"  # in a rule: any value but an off-switch
METHODS_OF_A_PAPER = ("efron1979bootstrap", "koehn2004significance", "noreen1989", "holm1979")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A publication, with the facts as published; its texts are BibTeX, in UTF-8."""

    title: str
    authors: str
    year: int
    venue: str = ""  # the proceedings
    journal: str = ""
    volume: int | None = None
    number: int | None = None
    pages: str = ""
    publisher: str = ""
    arxiv: str = ""
    url: str = ""

    def bibtex(self, key: str) -> str:
        """Its entry in references.bib; names and titles keep their capital letters."""
        kind = "inproceedings" if self.venue else "article" if self.journal else "book" if self.publisher else "misc"
        fields = {"author": self.authors, "title": f"{{{self.title}}}"}
        fields |= {"booktitle": self.venue, "journal": self.journal, "pages": self.pages}
        fields |= {name: str(value) for name in ("volume", "number") if (value := getattr(self, name)) is not None}
        fields |= {"publisher": self.publisher, "year": str(self.year)}
        where = f"arXiv:{self.arxiv}" if self.arxiv else rf"\url{{{self.url}}}" if self.url else ""
        fields["note" if kind != "misc" else "howpublished"] = where
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{kind}{{{key},", *lines, "}"])


@dataclass(frozen=True, kw_only=True)
class Use:
    """A method that a run uses by the values of its configuration, its name in each language, and what is cited for it."""

    kind: str
    when: dict[str, Any]
    name: dict[str, str]
    cite: list[str]

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether the flat configuration has the values of the rule."""
        return all(_fits(values.get(key), wanted) for key, wanted in self.when.items())


def _fits(value: Any, wanted: Any) -> bool:
    if wanted == SET:
        return value not in (None, False, "none", "", [])
    return comparable(value) in [comparable(each) for each in (wanted if isinstance(wanted, list) else [wanted])]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A model, a data set or a package: under which licence it is published (None: unknown), and what is cited for it.

    An empty `cite` says that there is nothing to cite; an asset that the registry lacks is no Asset.
    """

    cite: list[str]
    licence: str | None = None
    ids: list[str] = field(default_factory=list)
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The content of references.yaml."""

    works: dict[str, Work]
    uses: list[Use]
    models: dict[str, Asset]  # by id in lower case
    datasets: dict[str, Asset]
    software: dict[str, Asset]  # by the name of the distribution

    def uses_of(self, values: Mapping[str, Any], kind: str) -> list[Use]:
        """The rules of a kind that fit the configuration: the first one, of the kind `with` all."""
        fitting = [use for use in self.uses if use.kind == kind and use.fits(values)]
        return fitting if kind == "with" else fitting[:1]

    def model(self, name: str) -> Asset | None:
        """The entry of a model by its id on the hub; None for an unknown one, and for a folder, which may hold any."""
        return self.models.get(name.lower())

    def dataset(self, source: str | None) -> Asset | None:
        """The entry of a data set by its id on the hub or its address."""
        return self.datasets.get(source.lower()) if source else None

    def bibtex(self, keys: Iterable[str]) -> str:
        """The entries of these works, sorted by key."""
        return "\n\n".join(self.works[key].bibtex(key) for key in sorted({*keys})) + "\n"


@cache
def registry() -> Registry:
    """The registry that ships with glmtuner; raises TypeError for a field that no entry has, and KeyError for an unknown work."""
    content = yaml.safe_load(REGISTRY.read_text(encoding="utf-8"))
    works = {key: Work(**entry) for key, entry in content["works"].items()}
    uses = [Use(**entry) for entry in content["uses"]]
    assets = [[Asset(**entry) for entry in content[group]] for group in ("models", "datasets")]
    software = {name: Asset(**entry) for name, entry in content["software"].items()}
    citing: list[Use | Asset] = [*uses, *assets[0], *assets[1], *software.values()]
    if unknown := {key for each in citing for key in each.cite} - works.keys():
        raise KeyError(f"{REGISTRY} cites {', '.join(sorted(unknown))}, which it does not have")
    models, datasets = ({name.lower(): each for each in group for name in each.ids} for group in assets)
    return Registry(works=works, uses=uses, models=models, datasets=datasets, software=software)


def cite(keys: Sequence[str]) -> str:
    r"""`~\cite{…}` of the works; empty without any."""
    return rf"~\cite{{{','.join(dict.fromkeys(keys))}}}" if keys else ""
