"""Hyperparameters of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers.training_args import TrainingArguments as PlainArguments
from trl.trainer.sft_config import SFTConfig as TRLConfig

from unsloth.core.errors import ConfigError
from unsloth.train.follow import FOLLOWING_THE_MODEL, FollowsModel
from unsloth.train.row_arguments import RowArguments
from unsloth.train.spellings import accepts_earlier_names
from unsloth.train.survival import SurvivalArguments

_OTHER_DEFAULT = ("logging_nan_inf_filter", "padding_free")

_Config = TypeVar("_Config", bound=FollowsModel)


@accepts_earlier_names
@dataclass
class TrainingArguments(PlainArguments):
    """``transformers.TrainingArguments`` that also takes the arguments of earlier releases."""


@accepts_earlier_names
@dataclass
class SFTConfig(RowArguments, SurvivalArguments, FollowsModel, TRLConfig):
    """TRL's ``SFTConfig``, with defaults that follow the model.

    Everything of ``trl.SFTConfig`` and ``transformers.TrainingArguments`` is accepted, under today's names or those
    of earlier releases (:mod:`unsloth.train.spellings`), and the fields of
    :class:`unsloth.train.row_arguments.RowArguments` and :class:`unsloth.train.survival.SurvivalArguments`. What
    differs:

    Attributes:
        max_length: Longest row in tokens; longer rows are cut, and counted in the log. None means the
            ``max_seq_length`` that the model was loaded with.
        max_seq_length: The earlier name of ``max_length``.
        bf16: Compute in bfloat16 under autocast. None means: if the model was loaded in bfloat16.
        fp16: Compute in float16 under autocast.
        gradient_checkpointing: None means: as the model was told in ``get_peft_model``.
        fused_head: Compute output head and loss together, in chunks, so that the logits never exist as a whole.
            True means with the fused head of the model (:mod:`unsloth.layers.fused_head`), or with TRL's where the
            model has none. None means so on a GPU; on the CPU the model's own loss, so that a run equals one of plain
            transformers bit for bit.
        padding_free: Lay the rows of a batch end to end instead of padding them; they do not see each other, and loss
            and gradients are those of the padded batch. None means: on a GPU, where the model's attention keeps rows
            apart at no cost (its plan says so), unless something reads padded batches: a collator, metrics computed
            from logits, or ``pad_to_multiple_of``.
        join_batches: Compute micro-batches of one update together, up to 8,192 tokens and never more than
            ``per_device_train_batch_size`` rows of ``max_length`` have, where they are laid end to end: the same sums
            in fewer passes. None means: on a GPU, where the memory policy adapts to the size of a pass
            (``use_gradient_checkpointing="unsloth"``).
        return_logits: Compute the logits beside the loss, for callbacks and subclasses that read ``outputs.logits``.
            None means: only where something asks for them, such as ``compute_metrics``, or with
            ``UNSLOTH_RETURN_LOGITS=1``.
        embedding_learning_rate: Learning rate of the input embedding and of the output head, where they are
            trained (``embed_tokens`` and ``lm_head`` among the ``target_modules``, or full fine-tuning). None means
            ``learning_rate``. For continued pretraining, a tenth to a half of ``learning_rate`` is usual.
        assistant_only_loss: Train on the assistant's turns only, found by the chat template's own markers.
    """

    padding_free: bool | None = field(default=None, metadata={"help": "Lay rows end to end; None follows the model."})
    join_batches: bool | None = field(default=None, metadata={"help": "Compute short micro-batches together."})
    fused_head: bool | None = field(default=None, metadata={"help": "Compute the loss without the whole logits."})
    return_logits: bool | None = field(default=None, metadata={"help": "Compute the logits beside the loss."})
    embedding_learning_rate: float | None = field(default=None, metadata={"help": "Of embeddings and output head."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_learning_rate is not None and not self.embedding_learning_rate > 0:
            raise ConfigError("embedding_learning_rate must be positive", got=self.embedding_learning_rate)


def from_training_arguments(
    args: PlainArguments | None, kind: type[_Config], changes: Mapping[str, Any] | None = None
) -> _Config:
    """A configuration of ``kind`` from whatever was passed as ``args``: one of ours, TRL's, a plain one, or None.

    Fields of which our default follows the model do so here too, if they have their own class's default. ``changes``
    are fields that take precedence; one of ours is changed in place.
    """
    changes = dict(changes or {})
    if args is None:
        return kind(**{"output_dir": "outputs", **changes})
    if isinstance(args, kind):
        args.change(changes)
        return args
    if not isinstance(args, PlainArguments):
        raise ConfigError(
            "args must be training arguments",
            got=args,
            do=f"Pass args={kind.__name__}(...) or args=TrainingArguments(...).",
        )
    ours = {name for name, field in kind.__dataclass_fields__.items() if field.init}
    values: dict[str, Any] = {}
    for name, own in args.__dataclass_fields__.items():
        value = getattr(args, name)
        untouched = name in FOLLOWING_THE_MODEL and (value == own.default or value is False)
        untouched |= name in _OTHER_DEFAULT and value == own.default
        if own.init and name in ours and not untouched:
            values[name] = value
    return kind(**{"logging_dir": getattr(args, "logging_dir", None), **values, **changes})
