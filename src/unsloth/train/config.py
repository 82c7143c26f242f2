"""Hyperparameters of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.training_args import TrainingArguments as PlainArguments
from trl.trainer.sft_config import SFTConfig as TRLConfig

from unsloth.core.errors import ConfigError
from unsloth.models.record import LoadRecord
from unsloth.train.spellings import accepts_earlier_names
from unsloth.train.survival import SurvivalArguments

_FOLLOWING_THE_MODEL = ("bf16", "gradient_checkpointing", "activation_checkpointing", "max_length")
_OTHER_DEFAULT = ("logging_nan_inf_filter",)


@accepts_earlier_names
@dataclass
class TrainingArguments(PlainArguments):
    """``transformers.TrainingArguments`` that also takes the arguments of earlier releases."""


@accepts_earlier_names
@dataclass
class SFTConfig(SurvivalArguments, TRLConfig):
    """TRL's ``SFTConfig``, with defaults that follow the model.

    Everything of ``trl.SFTConfig`` and ``transformers.TrainingArguments`` is accepted, under today's names or those
    of earlier releases (:mod:`unsloth.train.spellings`), and the fields of
    :class:`unsloth.train.survival.SurvivalArguments`. What differs:

    Attributes:
        max_length: Longest row in tokens; longer rows are cut, and counted in the log. None means the
            ``max_seq_length`` that the model was loaded with.
        max_seq_length: The earlier name of ``max_length``.
        bf16: Compute in bfloat16 under autocast. None means: if the model was loaded in bfloat16.
        fp16: Compute in float16 under autocast.
        gradient_checkpointing: None means: as the model was told in ``get_peft_model``.
        fused_head: Compute output head and loss together, in chunks, so that the logits never exist as a whole
            (TRL's fused head). None means: on a GPU, where it saves memory. On the CPU the model's own loss is
            used, so that a run equals one of plain transformers bit for bit.
        embedding_learning_rate: Learning rate of the input embedding and of the output head, where they are
            trained (``embed_tokens`` and ``lm_head`` among the ``target_modules``, or full fine-tuning). None means
            ``learning_rate``. For continued pretraining, a tenth to a half of ``learning_rate`` is usual.
        assistant_only_loss: Train on the assistant's turns only, found by the chat template's own markers.
    """

    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Earlier name of max_length."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "None follows the model."})

    fused_head: bool | None = field(default=None, metadata={"help": "Compute the loss without the whole logits."})
    embedding_learning_rate: float | None = field(default=None, metadata={"help": "Of embeddings and output head."})

    def __post_init__(self) -> None:
        self._precision_follows_model = self.bf16 is None and not self.fp16  # type: ignore[has-type]
        # transformers renamed the field during 5.x; where both names exist the new one rules
        self._checkpointing_field = (
            "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        )
        given = (self.gradient_checkpointing, getattr(self, self._checkpointing_field))
        self._checkpointing_follows_model = given == (None, None)
        if self._precision_follows_model:
            self.bf16 = False
        if self._checkpointing_follows_model:
            setattr(self, self._checkpointing_field, False)
        super().__post_init__()
        if self.embedding_learning_rate is not None and not self.embedding_learning_rate > 0:
            raise ConfigError("embedding_learning_rate must be positive", got=self.embedding_learning_rate)
        if self.max_seq_length is not None:
            if self.max_length not in (None, self.max_seq_length):
                raise ConfigError(
                    "max_length and its earlier name max_seq_length contradict each other",
                    got=f"{self.max_length} and {self.max_seq_length}",
                    do="Give one of them.",
                )
            self.max_length = self.max_seq_length

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


def from_training_arguments(args: PlainArguments | None) -> SFTConfig:
    """Our configuration from whatever was passed as ``args``: ours, TRL's, plain ``TrainingArguments``, or None.

    Fields of which our default follows the model do so here too, if they have their own class's default.
    """
    if args is None:
        return SFTConfig(output_dir="outputs")
    if isinstance(args, SFTConfig):
        return args
    if not isinstance(args, PlainArguments):
        raise ConfigError(
            "args must be training arguments", got=args, do="Pass args=SFTConfig(...) or args=TrainingArguments(...)."
        )
    ours = {name for name, field in SFTConfig.__dataclass_fields__.items() if field.init}
    values: dict[str, Any] = {}
    for name, own in args.__dataclass_fields__.items():
        value = getattr(args, name)
        untouched = name in _FOLLOWING_THE_MODEL and (value == own.default or value is False)
        untouched |= name in _OTHER_DEFAULT and value == own.default
        if own.init and name in ours and not untouched:
            values[name] = value
    return SFTConfig(**values, logging_dir=getattr(args, "logging_dir", None))
