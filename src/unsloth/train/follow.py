"""Training arguments whose defaults follow the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unsloth.core.errors import ConfigError
from unsloth.models.record import LoadRecord

FOLLOWING_THE_MODEL = ("bf16", "gradient_checkpointing", "activation_checkpointing", "max_length")
"""Fields that are filled from the model where they were left open."""


@dataclass
class FollowsModel:
    """Fields to be mixed into a trainer's configuration, before the class of transformers or TRL.

    Attributes:
        max_length: Longest row in tokens; longer rows are cut, and counted in the log. None means the
            ``max_seq_length`` that the model was loaded with.
        max_seq_length: The earlier name of ``max_length``.
        bf16: Compute in bfloat16 under autocast. None means: if the model was loaded in bfloat16.
        gradient_checkpointing: None means: as the model was told in ``get_peft_model``.
    """

    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Earlier name of max_length."})
    bf16: bool | None = field(default=None, metadata={"help": "None follows the model."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "None follows the model."})

    def __post_init__(self) -> None:
        self._precision_follows_model = self.bf16 is None and not self.fp16  # type: ignore[has-type]
        # transformers renamed the field during 5.x; where both names exist the new one rules
        self._checkpointing_field = (
            "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        )
        given = (self.gradient_checkpointing, getattr(self, self._checkpointing_field))
        self._checkpointing_follows_model = given == (None, None)
        if self.bf16 is None:
            self.bf16 = False
        if self._checkpointing_follows_model:
            setattr(self, self._checkpointing_field, False)
        super().__post_init__()  # type: ignore[misc]
        if self.max_seq_length is not None:
            if self.max_length not in (None, self.max_seq_length):
                raise ConfigError(
                    "max_length and its earlier name max_seq_length contradict each other",
                    got=f"{self.max_length} and {self.max_seq_length}",
                    do="Give one of them.",
                )
            self.max_length = self.max_seq_length

    def change(self, values: Mapping[str, Any]) -> None:
        """Set fields that were given to the trainer itself."""
        for name, value in values.items():
            if name == "report_to" and isinstance(value, str):  # as transformers reads it
                value = [] if value == "none" else [value]
            setattr(self, name, value)

    def follow(self, model: LoadRecord | None) -> None:
        """Fill what was left open from the way ``model`` was loaded."""
        if self.max_length is None:
            self.max_length = model.max_seq_length if model else 1024
        if self._precision_follows_model and model is not None:
            self.bf16 = model.dtype == torch.bfloat16
            self.fp16 = model.dtype == torch.float16 and torch.cuda.is_available()
            self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        if self._checkpointing_follows_model and model is not None:
            self._set_checkpointing(bool(model.gradient_checkpointing))
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # would only warn

    def _set_checkpointing(self, on: bool) -> None:
        options = {"use_reentrant": False} if on else None
        for field_name in {self._checkpointing_field, "gradient_checkpointing"}:
            setattr(self, field_name, on)
            setattr(self, f"{field_name}_kwargs", options)
