"""Training on the assistant's turns only."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError
from unsloth.data import masking
from unsloth.train.sft import SFTTrainer


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    last_response_only: bool = False,
    num_proc: int | None = None,
    force_match: bool = True,
) -> SFTTrainer:
    """Mask everything but the assistant's turns in the trainer's data sets.

    What follows ``response_part`` is trained, up to the next ``instruction_part``; the end-of-turn token is
    included. Without parts, whose text is whose is read off the chat template as it renders each conversation; rows
    that are rendered already are searched for the texts that this template starts turns with.

    Args:
        trainer: An :class:`SFTTrainer` on text or conversations.
        instruction_part: The text that starts a user's turn.
        response_part: The text that starts an assistant's turn.
        tokenizer: Read the texts that start turns off this tokenizer's chat template instead.
        last_response_only: Train only the last of the assistant's turns in each row.
        num_proc: Accepted for compatibility; ``dataset_num_proc`` of the trainer holds.
        force_match: Accepted for compatibility; the parts always match exactly.

    Returns:
        The same trainer.

    Raises:
        ConfigError: Only one part was given, or the trainer is of another kind.
        DataError: No row has anything left to train; shows the first row as it was rendered.
    """
    if not isinstance(trainer, SFTTrainer):
        raise ConfigError("train_on_responses_only needs an SFTTrainer of unsloth", got=type(trainer).__name__)
    if (instruction_part is None) != (response_part is None):
        raise ConfigError("instruction_part and response_part go together", do="Give both, or neither.")
    markers = None
    if instruction_part is not None and response_part is not None:
        markers = masking.ResponseMarkers(instruction_part, response_part)
    elif tokenizer is not None and tokenizer is not trainer.processing_class:
        markers = masking.find_markers(tokenizer)
    trainer.train_on_responses(markers, last_only=last_response_only)
    return trainer
