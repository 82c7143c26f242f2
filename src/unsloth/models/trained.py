"""What a model remembers about how it was trained, for the card that is written when it is saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel

from unsloth.models.record import transformers_model

_ATTRIBUTE = "unsloth_trained"


@dataclass(frozen=True)
class Trained:
    """The last run on a model.

    Attributes:
        method: Name of the trainer's class.
        steps: Optimizer steps.
        epochs: Passes over the rows.
        rows: Rows of the training data, where that is known.
        batch_size: Rows of a step, all accumulated.
        learning_rate: The highest.
        optimizer: Its name.
        losses: Logged (step, training loss).
        held_out: Logged (step, loss on held-out rows).
    """

    method: str
    steps: int
    epochs: float
    rows: int | None
    batch_size: int
    learning_rate: float
    optimizer: str
    losses: tuple[tuple[int, float], ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()


def note(model: torch.nn.Module, run: Trained) -> None:
    """Keep the description of a run on the model (the one below any adapter)."""
    setattr(model.get_base_model() if isinstance(model, PeftModel) else model, _ATTRIBUTE, run)


def find(model: torch.nn.Module) -> Trained | None:
    """The description of the last run on the model, if there was one."""
    return getattr(transformers_model(model), _ATTRIBUTE, None)
