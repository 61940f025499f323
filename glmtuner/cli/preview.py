"""`--preview [N]`: the first rows of each dataset in colour, or as JSON."""

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from glmtuner.config.compose import Composed
from glmtuner.console import UNPRINTABLE, Segment, complain, labelled, say

if TYPE_CHECKING:
    from glmtuner.launch.preview import Preview, Shown

STYLES = {"prompt": "cyan", "learned": "bold green", "stop": "bold black on yellow", "cut": "red", "ids": "dim"}


def preview(composed: Composed, count: int, *, as_json: bool, with_ids: bool) -> None:
    """Print the rows of the first `count` records of each dataset; with `as_json` one object a line, all else on standard error."""
    from glmtuner.launch.preview import open_preview

    with redirect_stdout(sys.stderr if as_json else sys.stdout):  # notices of the datasets' entries, of the family
        opened = open_preview(composed)
    if not as_json:
        print_head(opened)
    for name in opened.specs:
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            rows = list(opened.rows(name, count))
        for note in opened.notes:
            (complain if as_json else say)(note)
        opened.notes.clear()
        for row in rows:
            if as_json:
                say(json_line(row))
            else:
                print_row(row, opened, with_ids)
    if not as_json:
        print_verdict(opened)
    elif (compared := opened.compared) is not None and compared.difference:
        complain(f"model.template={opened.template}: {compared}")


def json_line(row: "Shown") -> str:
    """The row as JSON, with escapes for what a terminal obeys, and for all but ASCII where the output is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(row.as_json(), ensure_ascii=not is_utf8)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def print_head(opened: "Preview") -> None:
    run = opened.composed.run
    by_user = "model.template" in opened.composed.user_keys
    chosen = "typed" if by_user else "the checkpoint's" if run.model.checkpoint_dir else "the family's"
    say(
        f"model {run.model.model_name_or_path}, model.template={opened.template} ({chosen}), stage={run.stage.name}"
        + ("; rows are shown before they are packed" if run.data.packing else "")
    )
    say("")


def print_row(row: "Shown", opened: "Preview", with_ids: bool) -> None:
    """Print one row: its parts with their names, what was cut, and the prompt that is served where it is another one."""
    for earlier in row.earlier:
        _print_one(earlier, f"{row.dataset}, record {row.index}, an earlier answer", opened, with_ids)
    unit = "row" if row.served_prompt is None else "record"
    _print_one(row, f"{row.dataset}, {unit} {row.index}", opened, with_ids)


def _print_one(row: "Shown", title: str, opened: "Preview", with_ids: bool) -> None:
    learned = sum(label >= 0 for label in row.labels)
    mode = "" if row.thinking is None else f", thinking {'on' if row.thinking else 'off'}"
    marked = row.further.get("is_desirable")
    judged = "" if marked is None else f", marked {'good' if marked else 'bad'}"
    weighing = f", weight {row.further['weight']:g}" if "weight" in row.further else ""
    if weights := row.further.get("weights"):
        from glmtuner.data.preview import learned_ranges

        each = ", ".join(f"{weights[start]:g}" for start, _ in learned_ranges(row.labels))
        weighing += f", weights of its answers {each}"
    lines: list[tuple[str, list[Segment]]] = []
    for kind, text in row.parts:
        lines.append((kind, [(text, STYLES[kind])]))
    if "rejected" in row.further:
        lines.append(("rejected", [(row.further["rejected"], "magenta")]))
    if row.cut:
        lines.append(("cut", [("; ".join(row.cut), STYLES["cut"])]))
    prompt = row.as_json()["prompt"]
    if row.served_prompt is not None:
        same = row.served_prompt == prompt
        lines.append(("served", [("the prompt above", "") if same else (row.served_prompt, STYLES["prompt"])]))
        if row.differs:
            lines.append(("differs", [(row.differs, "bold red")]))
        elif opened.official:
            lines.append(("official", [("the tokenizer's chat template renders the same", "")]))
    if with_ids:
        lines.append(("ids", [(" ".join(map(str, row.input_ids)), STYLES["ids"])]))
        labels = " ".join(str(label) if label >= 0 else "." for label in row.labels)
        lines.append(("labels", [(labels, STYLES["ids"])]))
    labelled(f"{title}: {len(row.input_ids)} tokens, {learned} learned{mode}{judged}{weighing}", lines)


def print_verdict(opened: "Preview") -> None:
    """Say whether the template is the tokenizer's own, on the conversations that a training compares as well."""
    if opened.encoder.accepts == ("plain text",):
        return
    compared = opened.compared
    if compared is None:
        say("the tokenizer has no chat template to compare with")
    elif not compared.names:
        say("the tokenizer's chat template, or the run's, renders no conversation that could be compared")
    elif compared.difference:
        verdict = "it is kept, since it was named" if opened.composed.run.model.template else "a training refuses this"
        say(f"model.template={opened.template}: {compared}; {verdict}")
    else:
        say(f"model.template={opened.template} renders what the tokenizer's chat template does; compared: {compared}")
