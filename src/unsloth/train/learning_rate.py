"""New hyperparameters for an optimizer that goes on from a saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

# Argument of the configuration: key of a parameter group
_KEYS = {"weight_decay": "weight_decay", "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
_RATES = {"learning_rate", "embedding_learning_rate"}
_SHAPES = {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"}


def continue_with(
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    fresh: Sequence[Mapping[str, Any]],
    changed: AbstractSet[str],
) -> None:
    """Let the present run's hyperparameters rule over those in a saved state, where the two differ.

    A saved state carries the learning rate and decay of its run, which would silently win otherwise.

    Args:
        optimizer: With the saved state loaded.
        scheduler: Likewise.
        fresh: The optimizer's parameter groups as they were before that.
        changed: Names of the arguments that differ.
    """
    keys = {key for name, key in _KEYS.items() if name in changed}
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update({key: new[key] for key in keys if key in new})
    if not changed & (_RATES | _SHAPES):
        return
    before = list(scheduler.base_lrs)
    scheduler.base_lrs = [group["initial_lr"] for group in fresh]
    for i, (group, new) in enumerate(zip(optimizer.param_groups, fresh, strict=True)):
        group["initial_lr"] = new["initial_lr"]
        if isinstance(scheduler, LambdaLR):
            group["lr"] = new["initial_lr"] * scheduler.lr_lambdas[i](scheduler.last_epoch)
        elif before[i]:
            group["lr"] *= new["initial_lr"] / before[i]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
