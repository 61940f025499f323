"""Muon for the matrices of a model and AdamW for everything else, as one optimizer: its state is one file of a checkpoint."""

from collections.abc import Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024) for `matrices`, torch's AdamW for `others`; both are parameter groups.

    The update of a matrix is the orthogonalized momentum, times 0.2 · √(larger dimension) with
    adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, arXiv:2502.16982): a learning rate means for both what it means for AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        **arguments: Any,
    ) -> None:
        super().__init__([{"matrices": True, **group} for group in matrices], lr=lr, **arguments)
        # torch's AdamW with the state of this optimizer; it is given its groups for the time of a step
        self._adamw = torch.optim.AdamW([torch.zeros(1)], lr=lr, betas=betas, eps=eps)
        for group in others:
            self.add_param_group({**self._adamw.defaults, "matrices": False, **group})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as it is: the defaults of a matrix's group are not AdamW's."""
        if param_group.get("matrices", True):
            super().add_param_group(param_group)
        elif param_group["params"]:
            defaults, self.defaults = self.defaults, {}
            try:
                super().add_param_group(param_group)
            finally:
                self.defaults = defaults

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of both; returns the closure's loss."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["matrices"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in groups if not group["matrices"]]
        self._adamw.step()
        return loss
