"""What a loaded model remembers about how it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from unsloth.core.errors import ModelError
from unsloth.memory import checkpointing
from unsloth.models.identity import Identity
from unsloth.models.rope import Scaling

Precision = Literal["4bit", "8bit", "16bit", "full"]

_ATTRIBUTE = "unsloth_record"
_ROWS = "unsloth_training_rows"


@dataclass(frozen=True)
class LoadRecord:
    """How a model was loaded; kept on the transformers model itself, below any adapter.

    Attributes:
        name: What the user asked for: a folder or a hub id.
        revision: The hub revision asked for, if any.
        precision: How the base weights are held.
        dtype: The dtype of computation.
        max_seq_length: Longest training sequence, in tokens.
        gradient_checkpointing: The memory policy while training.
        random_state: Seed of the adapters' initial values.
        base_name: For a loaded adapter, the name of its base model.
        base_revision: The hub revision of the base model, if one was asked for.
        rope: The scaling of the positions, where it is not the one in the model's own configuration.
        identity: What the base model is recognized by.
        vocabulary_resized: Whether rows of the embedding were added or set anew.
    """

    name: str
    revision: str | None
    precision: Precision
    dtype: torch.dtype
    max_seq_length: int
    gradient_checkpointing: checkpointing.Policy
    random_state: int
    base_name: str | None = None
    base_revision: str | None = None
    rope: Scaling | None = None
    identity: Identity | None = None
    vocabulary_resized: bool = False


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``, which may be wrapped by PEFT."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            "not a transformers model", got=type(model).__name__, do="Load it with FastLanguageModel.from_pretrained."
        )
    return inner


def is_classifier(model: torch.nn.Module) -> bool:
    """Whether ``model`` gives scores of whole sequences instead of logits of tokens."""
    return type(transformers_model(model)).__name__.endswith("ForSequenceClassification")


def attach(model: PreTrainedModel, record: LoadRecord) -> None:
    """Store ``record`` on the model (again, with other values, if need be)."""
    setattr(model, _ATTRIBUTE, record)
    model.max_seq_length = record.max_seq_length


def find(model: torch.nn.Module) -> LoadRecord | None:
    """The record of a model that was loaded by this library, else None."""
    return getattr(transformers_model(model), _ATTRIBUTE, None)


def require(model: torch.nn.Module) -> LoadRecord:
    """The record of a model; raise :class:`ModelError` if it was loaded by other means."""
    record = find(model)
    if record is None:
        raise ModelError(
            "this model was not loaded by FastLanguageModel.from_pretrained",
            got=type(model).__name__,
            do="Load it that way, so that its precision and sequence length are known.",
        )
    return record


def keep_rows(model: torch.nn.Module, rows: Any) -> None:
    """Keep the rows of token ids that ``model`` is trained on, on which a quantizer may measure it afterwards."""
    setattr(transformers_model(model), _ROWS, rows)


def kept_rows(model: torch.nn.Module) -> Any:
    """The rows of the last training run of this model in this process, or None."""
    return getattr(transformers_model(model), _ROWS, None)
