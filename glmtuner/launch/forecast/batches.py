"""The batches of a run's data: how many there are and how long, and a few of them, from the shortest to the longest."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.data.splits import TOKEN_COLUMNS, Datasets
from glmtuner.launch.forecast.cost import Rows, Size

if TYPE_CHECKING:
    from datasets import Dataset

FEW, BATCHES, OWN_STEPS = (
    9,
    24,
    4,
)  # that are tried: of slow ones few, and fewer where an objective takes steps of its own
RECORDS = 48  # of an evaluation that is tried, unless its batches are large
MOST_ANSWERS = 128  # that are generated at once, on a GPU

Lengths = tuple[int, ...]  # of one record, the number of tokens of each of its rows


@dataclass(frozen=True)
class Sample:
    """A run's data and the few rows of them that are tried."""

    run: Run
    data: Datasets  # the few
    train: Sequence[Lengths]  # of all records
    evaluation: Sequence[Lengths]
    prompts: Sequence[int]  # the lengths of all prompts that are answered

    def train_rows(self, unpadded: bool) -> Rows:
        """The batches of an epoch on one process."""
        lengths, size = self.train, self.run.trainer.per_device_train_batch_size
        if self.run.data.packing and unpadded:
            lengths = packs(self.run, lengths)
        return rows_of(ordered(self.run, lengths), size, unpadded, drops_last=self.run.trainer.dataloader_drop_last)

    def evaluation_rows(self, unpadded: bool) -> Rows:
        """The batches of an evaluation on one process."""
        return rows_of(self.evaluation, self.run.trainer.per_device_eval_batch_size, unpadded)

    def tried_batches(self, trainer: Any) -> int:
        """How many batches of the training are tried."""
        return max(len(trainer.train_dataset) // self.run.trainer.per_device_train_batch_size, 1)


def sampled(run: Run, data: Datasets) -> Sample:
    """A few of a run's rows, of all lengths, with the lengths of all."""
    train, evaluation = lengths_in(data.train), lengths_in(data.evaluation)
    prompts = (
        [len(ids) for ids in data.evaluation["prompt_ids"]]
        if data.evaluation is not None and "prompt_ids" in data.evaluation.column_names
        else []
    )
    few = data
    if data.train is not None:
        few = replace(few, train=data.train.select(chosen(run, train)).flatten_indices())
    if data.evaluation is not None:
        size = run.trainer.per_device_eval_batch_size
        # an evaluation has more than one batch, and as many answers are tried as are generated at once
        most = MOST_ANSWERS if run.trainer.predict_with_generate else max(min(RECORDS, 4 * size), 2 * size)
        few = replace(few, evaluation=data.evaluation.select(answered(evaluation, most)).flatten_indices())
    return Sample(run, few, train, evaluation, prompts)


def lengths_in(rows: "Dataset | None") -> list[Lengths]:
    """The tokens of each row that a record becomes, by record; of records without such columns (prompts) one row of 0."""
    if rows is None:
        return []
    names = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    if not names:
        return [(0,)] * len(rows)
    columns = []
    for name in names:
        parts = rows.select_columns([name]).with_format("arrow").iter(1000)
        columns.append([n for part in parts for n in part[name].combine_chunks().value_lengths().to_pylist()])
    return list(zip(*columns, strict=True))


def packs(run: Run, lengths: Sequence[Lengths]) -> list[Lengths]:
    """The lengths of the samples of each packed row."""
    from glmtuner.data.segments import packed

    flat = [length for record in lengths for length in record]
    capacity = max(run.data.max_source_length + run.data.max_target_length, *flat)
    return [tuple(flat[index] for index in pack) for pack in packed(flat, capacity)]


def ordered(run: Run, lengths: Sequence[Lengths]) -> list[Lengths]:
    """The records in an order like that of an epoch: shuffled, by similar length, or as they are."""
    strategy = run.trainer.train_sampling_strategy
    if strategy == "sequential":
        return list(lengths)
    shuffled = list(lengths)
    random.Random(0).shuffle(shuffled)
    return sorted(shuffled, key=sum) if strategy == "group_by_length" else shuffled


def computed(batch: Sequence[Lengths], unpadded: bool) -> Size:
    """What is computed of a batch: without padding, or with every row as long as the longest."""
    flat = [length for record in batch for length in record]
    lengths = flat if unpadded else [max(flat, default=0)] * len(flat)
    return Size(sum(lengths), sum(length**2 for length in lengths))


def rows_of(lengths: Sequence[Lengths], size: int, unpadded: bool, drops_last: bool = False) -> Rows:
    """The batches of so many records each, in this order."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    if drops_last and batches and len(batches[-1]) < size and len(batches) > 1:
        batches = batches[:-1]
    sizes = [computed(batch, unpadded) for batch in batches]
    flat = [length for record in lengths for length in record]
    return Rows(
        records=len(lengths),
        batches=len(batches),
        computed=sum(sizes, Size()),
        tokens=sum(flat),
        squares=sum(length**2 for length in flat),
        largest=round(max((size.tokens for size in sizes), default=0)),
        per_batch=size,
    )


def chosen(run: Run, lengths: Sequence[Lengths]) -> list[int]:
    """The records of the batches that are tried, batch after batch: a warm-up, the longest, and others of all lengths.

    Batches are drawn as an epoch draws them and chosen at equal distances in the order of their tokens, the first FEW of them as
    well as all. Records that are packed are as many as fill so many rows.
    """
    size = run.trainer.per_device_train_batch_size
    order = list(range(len(lengths)))
    if run.trainer.train_sampling_strategy != "sequential":
        random.Random(0).shuffle(order)
    if run.trainer.train_sampling_strategy == "group_by_length":
        order.sort(key=lambda index: sum(lengths[index]))
    if run.data.packing:
        capacity, filled = run.data.max_source_length + run.data.max_target_length, 0
        for count, index in enumerate(order, start=1):
            filled += sum(lengths[index])
            if filled >= BATCHES * size * capacity:
                return order[:count]
        return order
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) < size:
        batches.pop()
    batches.sort(key=lambda batch: computed([lengths[index] for index in batch], False).tokens)
    last = len(batches) - 1
    places = [last // 2, last, 0, *(round(place * last / (FEW - 2)) for place in range(1, FEW - 2))]
    more = BATCHES - len(places)
    places += [round((place + 0.5) * last / more) for place in range(more)]
    return [index for place in places[: BATCHES if run.stage.weighs else OWN_STEPS] for index in batches[place]]


def answered(lengths: Sequence[Lengths], most: int) -> list[int]:
    """Records of an evaluation, at most so many, at equal distances in the order of their lengths."""
    order = sorted(range(len(lengths)), key=lambda index: sum(lengths[index]))
    count = min(most, len(order))
    return [order[place * len(order) // count] for place in range(count)] if count else []
