"""The first rows of each dataset, as they will be trained and served; nothing is loaded but the tokenizer, nothing is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed, run_folder_of
from glmtuner.config.groups import Model
from glmtuner.config.paths import PACKAGE_DATA
from glmtuner.data import Loaded, load
from glmtuner.data.columns import description
from glmtuner.data.encode import Encoder
from glmtuner.data.piecewise import PLAIN_TEXT, check_kinds
from glmtuner.data.preview import Row, decode, parts_of, sample_of, served_prompt
from glmtuner.data.spec import DatasetSpec
from glmtuner.data.splits import dataset_entries
from glmtuner.errors import ConfigError
from glmtuner.families.hub import read_config, source_of
from glmtuner.launch.build import resolve_family, resolve_template
from glmtuner.launch.checks import check_base
from glmtuner.launch.libraries import load_libraries
from glmtuner.launch.places import catalogue_dirs, output_folder
from glmtuner.launch.template_check import Compared, Official, compare_battery, official_of
from glmtuner.stages.stage import learning_stage
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = {  # of a record without a row, by what is counted
    "undesirable": "its answer is marked false",
    "unlearned": "no answer in it is learned, by its marks",
    "unrendered": "the chat template renders nothing of its last answer",
}


@dataclass(frozen=True)
class Shown:
    """A row of record `index` of a dataset (from 0, broken records included; of plain text the row's own number).

    `parts` are the kind and the text of each part; `differs` is how it differs from the tokenizer's chat template, None if it
    does not, or if there is none to compare with. `further` are the columns that only some stages have.
    """

    dataset: str
    index: int
    parts: Sequence[tuple[str, str]]
    input_ids: Sequence[int]
    labels: Sequence[int]
    served_prompt: str | None = None
    thinking: bool | None = None
    differs: str | None = None
    cut: Sequence[str] = ()
    earlier: "Sequence[Shown]" = ()
    further: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as `--json` prints it: `prompt` is what stands before the last answer that is learned, earlier ones included."""
        learned = [text for kind, text in self.parts if kind == "learned"]
        stops = [text for kind, text in self.parts if kind == "stop"]
        last = max((place for place, (kind, _) in enumerate(self.parts) if kind == "learned"), default=len(self.parts))
        return {
            "dataset": self.dataset,
            "index": self.index,
            "prompt": "".join(text for _, text in self.parts[:last]),
            "learned": learned[0] if len(learned) == 1 else learned,
            "stop": stops[-1] if stops else "",
            **({"stops": stops} if len({*stops}) > 1 else {}),
            "served_prompt": self.served_prompt,
            "input_ids": list(self.input_ids),
            "labels": list(self.labels),
            "differs": self.differs,
            **({"cut": list(self.cut)} if self.cut else {}),
            **self.further,
            **({"earlier": [row.as_json() for row in self.earlier]} if self.earlier else {}),
        }


@dataclass(frozen=True)
class Preview:
    """The rows of a run's datasets, and what is said of them all.

    `template` is its name, and `official` the tokenizer's own, None if it has none.
    """

    composed: Composed
    specs: dict[str, DatasetSpec]
    encoder: Encoder
    template: str
    official: Official | None
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> Compared | None:
        """The conversations that a training compares as well; None without a template to compare with."""
        return compare_battery(self.official) if self.official else None

    def rows(self, name: str, count: int) -> Iterator[Shown]:
        """The rows of the first `count` records of a dataset that have one; `notes` grow by what is left out."""
        run = self.composed.run
        loaded = load(
            self.specs[name], dataset_dir=run.data.dataset_dir, package_data=PACKAGE_DATA, split=run.data.split,
            max_samples=run.data.max_samples, cache_dir=run.model.cache_dir, token=run.model.use_auth_token,
            checksums=False,
        )  # fmt: skip
        shown = self._documents if self.encoder.accepts == PLAIN_TEXT else self._records
        yield from islice(shown(name, loaded), count)
        self.notes.extend(f"dataset {name!r}: broken: {record}" for record in loaded.bad)
        self.notes.append(f"dataset {name!r}: {description(self.specs[name], loaded.columns)}")

    def _documents(self, name: str, loaded: Loaded) -> Iterator[Shown]:
        """The rows of plain text, which are cut from all documents of a batch."""
        index, tokenizer = 0, self.encoder.tokenizer
        while examples := list(islice(loaded.examples, self.encoder.batch_size)):
            check_kinds(examples, self.encoder, self.specs[name])
            for row in self.encoder.encode(examples)[0]:
                start = row["labels"].count(IGNORE_INDEX)
                parts = [("prompt", row["input_ids"][:start]), ("learned", row["input_ids"][start:])]
                texts = [(kind, decode(tokenizer, ids)) for kind, ids in parts if ids]
                yield Shown(name, index, texts, row["input_ids"], row["labels"], further=weights_of(row))
                index += 1

    def _records(self, name: str, loaded: Loaded) -> Iterator[Shown]:
        number = 0
        for number, example in enumerate(loaded.examples):
            index = number + len(loaded.bad)
            check_kinds([example], self.encoder, self.specs[name])
            sample, counts = sample_of(self.encoder, example)
            if sample is None:
                reason = next((text for key, text in LEFT_OUT.items() if getattr(counts, key)), "it has no row")
                self.notes.append(f"dataset {name!r}: record {index} is left out: {reason}")
                continue
            columns, further = sample.columns, dict[str, Any]()
            if "rejected_ids" in columns:
                parts = dict(self._texts(columns["rejected_ids"], columns["rejected_labels"]))
                further = {
                    "rejected": parts.get("learned", ""),
                    "rejected_ids": list(columns["rejected_ids"]),
                    "rejected_labels": list(columns["rejected_labels"]),
                }
            if "is_desirable" in columns:
                further["is_desirable"] = columns["is_desirable"]
            further |= weights_of(columns)
            earlier = [
                self._shown(name, index, row, further=weights_of(part))
                for row, part in zip(sample.earlier, columns.get("earlier", ()), strict=False)
            ]
            yield self._shown(name, index, sample.own, cut=sample.cut, earlier=earlier, further=further)

    def _shown(self, name: str, index: int, row: Row, **more: Any) -> Shown:
        encoder, asks_thinking = self.encoder, self.composed.run.generation.asks_thinking
        asks_thinking = encoder.asks_thinking if asks_thinking is None else asks_thinking
        served = served_prompt(encoder.template, encoder.tokenizer, row, asks_thinking)
        differs = None
        if self.official and not self.official.comparable(row):
            differs = "the tokenizer's chat template does not render the tools of this record"
        elif self.official and (found := self.official.difference(row, asks_thinking)):
            differs = str(found)
        return Shown(
            name, index, self._texts(row.input_ids, row.labels), row.input_ids, row.labels,
            decode(encoder.tokenizer, served), row.thinking, differs, **more,
        )  # fmt: skip

    def _texts(self, input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, str]]:
        tokenizer = self.encoder.tokenizer
        texts = [(part, decode(tokenizer, part.ids)) for part in parts_of(input_ids, labels)]
        # sentencepiece decodes its end of text to nothing
        return [
            (part.kind, text if text or part.kind != "stop" else str(tokenizer.convert_ids_to_tokens(part.ids[0])))
            for part, text in texts
        ]


def open_preview(composed: Composed) -> Preview:
    """The preview of a composed run, for which its tokenizer is loaded; raises GlmtunerError as the run itself would."""
    run, stage = composed.run, learning_stage(composed.run)
    specs = dataset_entries(run, catalogue_dirs(composed))
    model_config = read_config(run.model) if has_config(run.model) else {}
    if model_config:
        check_base(run.model, model_config)
    family, _ = resolve_family(run, model_config)
    load_libraries(compiles=False, trains=False)
    from glmtuner.models.load import load_tokenizer

    tokenizer: PreTrainedTokenizerBase = load_tokenizer(run.model, run.data.new_tokens)
    continues = run.trainer.do_train and not run.trainer.overwrite_output_dir
    resumed = run_folder_of(str(output_folder(composed))) if continues else None
    name, template = resolve_template(run, family, tokenizer, resumed)
    encoder = stage.encoder(run, template, tokenizer)
    if encoder is None:
        raise ConfigError(
            f"--preview with stage={stage.name}: this stage makes its rows in a way of its own, which cannot be shown; leave "
            "--preview out, or give the stage an `encoder`"
        )
    return Preview(composed, specs, encoder, name, official_of(run, encoder))


def has_config(model: Model) -> bool:
    """Whether a config.json may be there; a folder with a tokenizer alone has a template, and no family but a declared one."""
    folder = Path(source_of(model, model.config_name or model.model_name_or_path))
    return not folder.is_dir() or (folder / "config.json").is_file() or not (folder / "tokenizer_config.json").is_file()


def weights_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's `weight` and the `weights` of its labels, as far as they are other than 1."""
    weight, weights = row.get("weight", 1), row.get("weights")
    return {**({"weight": weight} if weight != 1 else {}), **({"weights": list(weights)} if weights else {})}
