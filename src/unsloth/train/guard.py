"""The guarded step: an optimizer step on gradients that are not finite is not taken."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from unsloth.core.errors import TrainingError
from unsloth.core.log import get_logger
from unsloth.train.memory_error import Snapshot, is_out_of_memory

_ATTRIBUTE = "unsloth_guard"

logger = get_logger(__name__)


class StepGuard:
    """Decides for every optimizer step whether it is taken, from the gradient norm before clipping.

    A step that is not taken leaves the weights, the optimizer's moments and its step count as they are (with zeroed
    gradients AdamW would still move), and the learning rate schedule waits. With float16's loss scaling, overflows
    are how the scale is found: the scaler skips those steps itself, and they count as failures only once the scale
    has come down to 1.

    Args:
        limit: After this many steps in a row that were not taken, the run ends.

    Attributes:
        skipped: Steps not taken since the start of the run.
        in_a_row: Those since the last step that was taken.
        is_open: Whether an optimizer step has begun that the trainer has not counted yet; weights and step number do
            not belong together then.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self.is_open = False
        self._finite = True

    def attach(self, optimizer: AcceleratedOptimizer) -> None:
        """Put this guard before the ``step`` of one optimizer, in place of an earlier guard."""
        if not hasattr(optimizer, _ATTRIBUTE):
            optimizer.unsloth_step = optimizer.step
            optimizer.step = MethodType(_guarded_step, optimizer)
        setattr(optimizer, _ATTRIBUTE, self)

    def judge(self, gradient_norm: torch.Tensor | float, scaler: torch.amp.GradScaler | None, step: int) -> None:
        """Take up the norm of the gradients of the step that comes next.

        Args:
            gradient_norm: Before clipping, after unscaling.
            scaler: The loss scaler, with float16.
            step: Its number, for messages.

        Raises:
            TrainingError: Too many steps in a row were not taken.
        """
        self._finite = bool(torch.isfinite(torch.as_tensor(gradient_norm)))
        if self._finite:
            self.in_a_row = 0
            return
        self.skipped += 1
        if scaler is not None and scaler.get_scale() > 1:
            return
        self.in_a_row += 1
        logger.warning("step %d was not taken: its gradients are not finite (norm %s)", step, float(gradient_norm))
        if self.in_a_row >= self.limit:
            raise TooManySkipped(step, self.in_a_row)

    def allows(self, optimizer: AcceleratedOptimizer) -> bool:
        """Whether the step may run; a loss scaler must see every step, and skips by itself."""
        return self._finite or optimizer.scaler is not None


class TooManySkipped(Exception):
    """The gradients of several steps in a row were not finite; the trainer explains it to the user."""

    def __init__(self, step: int, count: int) -> None:
        super().__init__(step, count)
        self.step = step
        self.count = count


def _guarded_step(self: AcceleratedOptimizer, closure: Any = None) -> None:
    """``optimizer.step``, unless the guard says no; if it fails half way, the weights go back to what they were."""
    guard = getattr(self, _ATTRIBUTE)
    if not guard.allows(self):
        self._is_overflow = True  # what accelerate asks before it advances the schedule
        return
    if self.scaler is None:
        self._is_overflow = False
    snapshot = Snapshot([parameter for group in self.param_groups for parameter in group["params"]])
    guard.is_open = True
    try:
        self.unsloth_step(closure)
    except BaseException as error:
        if snapshot.restore() or not is_out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory in the middle of an optimizer step: some weights are new, some are not",
            do="Do not use this model any further; load it again and resume from the last checkpoint.",
        ) from error
