"""The batches of a training: their order, and on several ranks every row once."""

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from glmtuner.data.segments import lengths_of
from glmtuner.distributed import ranks
from glmtuner.training.samplers import EvenBatches, PaddedRows, draw_base_seed

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

        The last batches are filled with padding rows instead; not for an objective, whose rows have no padding row.
        """
        if ranks.world_size() == 1 or self.args.dataloader_drop_last or self.objective is not None:
            loader = super().get_train_dataloader()
            self.share_rows(loader)
            return loader
        rows: Any = self.train_dataset
        padded = PaddedRows(rows)
        self.train_dataset = padded
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = rows
        shard: Any = loader.batch_sampler  # accelerate's BatchSamplerShard
        shard.batch_sampler = EvenBatches(shard.batch_sampler, self.data_ranks, padded.padding_index)
        self.share_rows(loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """transformers' loader, which it keeps for the next evaluation if its workers persist."""
        loader = super().get_eval_dataloader(eval_dataset)
        self.share_rows(loader)
        draw_base_seed(loader)
        return loader
