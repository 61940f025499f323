"""The batches of a training: their order, and on several ranks every row once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from glmtuner.data.segments import lengths_of
from glmtuner.distributed import ranks
from glmtuner.training.samplers import CountedRows, EvenBatches, PaddedRows, draw_base_seed

if TYPE_CHECKING:
    from glmtuner.objectives.objective import Objective


class LoadingTrainer(Trainer):
    """transformers' Trainer with other loaders."""

    objective: "Objective | None"
    sequence: int  # the ranks that share a row

    @property
    def data_ranks(self) -> int:
        """The number of ranks, or of groups of ranks, that learn different rows."""
        return ranks.world_size() // self.sequence

    def get_total_train_batch_size(self, args: Any) -> int:
        """The rows of an optimizer step, over all ranks."""
        return int(super().get_total_train_batch_size(args)) // self.sequence

    def share_rows(self, loader: DataLoader[Any]) -> None:
        """Give the ranks that share a row the same batches."""
        if self.sequence > 1:
            shard: Any = loader.batch_sampler  # accelerate's BatchSamplerShard
            shard.num_processes, shard.process_index = self.data_ranks, ranks.rank() // self.sequence

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the rows of an evaluation's batch on all ranks, in the order of the rows."""
        if self.sequence == 1:
            gathered: torch.Tensor = self.gather_function(values)
            return gathered
        by_rank = self.accelerator.gather(values).unflatten(0, (ranks.world_size(), -1))
        return by_rank[:: self.sequence].flatten(0, 1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Batches of similar length read the lengths as a column; transformers would read the rows one by one."""
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        if isinstance(rows, PaddedRows):
            rows = rows.rows
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(group_size, lengths=lengths_of(rows).tolist())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """On several ranks, every row of an epoch is learned once: accelerate would repeat rows to fill the last batches.

        The last batches are filled with padding rows instead. In batches of an objective they are marked, since its loss may not be
        one of labels alone.
        """
        if self.args.dataloader_drop_last:
            loader = super().get_train_dataloader()
        else:
            rows, load = self.train_dataset, super().get_train_dataloader

            def of_rows(padded: Any) -> DataLoader[Any]:
                self.train_dataset = padded
                try:
                    return load()
                finally:
                    self.train_dataset = rows

            loader = self._evened(rows, of_rows)
        self.share_rows(loader)
        return loader

    def _evened(self, rows: Any, load: Callable[[Any], DataLoader[Any]]) -> DataLoader[Any]:
        """The loader that `load` makes of these rows, with batches that are filled up on several ranks."""
        collator, ranks_differ = self.data_collator, ranks.world_size() > 1
        if self.objective is not None and (ranks_differ or self.args.gradient_accumulation_steps > 1):
            self.data_collator = CountedRows(collator)  # so that each row of an optimizer step weighs the same
        try:
            if not ranks_differ:
                return load(rows)
            padded = PaddedRows(rows, is_marked=self.objective is not None)
            loader = load(padded)
        finally:
            self.data_collator = collator
        shard: Any = loader.batch_sampler  # accelerate's BatchSamplerShard
        shard.batch_sampler = EvenBatches(shard.batch_sampler, self.data_ranks, padded.padding_index)
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """transformers' sampler of the rows themselves."""
        rows: Any = eval_dataset.rows if isinstance(eval_dataset, PaddedRows) else eval_dataset
        return super()._get_eval_sampler(rows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """transformers' loader, which it keeps for the next evaluation if its workers persist.

        Batches of an objective are filled up as in the training: its loss may be one of all rows of a batch.
        """
        load = super().get_eval_dataloader
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = load(rows) if self.objective is None else self._evened(rows, load)
        self.share_rows(loader)
        draw_base_seed(loader)
        return loader
