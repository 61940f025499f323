"""The batches of a training: their order, and on several ranks every row once."""

from typing import TYPE_CHECKING, Any

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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Batches of similar length read the lengths as a column; transformers would read the rows one by one."""
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        if isinstance(rows, PaddedRows):
            rows = rows.rows
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(group_size, lengths=lengths_of(rows))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """On several ranks, every row of an epoch is learned once: accelerate would repeat rows to fill the last batches.

        The last batches are filled with padding rows instead; not for an objective, whose rows have no padding row.
        """
        if ranks.world_size() == 1 or self.args.dataloader_drop_last or self.objective is not None:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        padded = PaddedRows(rows)
        self.train_dataset = padded
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = rows
        shard: Any = loader.batch_sampler  # accelerate's BatchSamplerShard
        shard.batch_sampler = EvenBatches(shard.batch_sampler, ranks.world_size(), padded.padding_index)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """transformers' loader, which it keeps for the next evaluation if its workers persist."""
        loader = super().get_eval_dataloader(eval_dataset)
        draw_base_seed(loader)
        return loader
