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
) -> SFTTrainer:
    """Mask everything but the assistant's turns in the trainer's data sets.

    What follows ``response_part`` is trained, up to the next ``instruction_part``; the end-of-turn token is
    included. Without parts, they are read off the chat template.

    Args:
        trainer: An :class:`SFTTrainer` on text or conversations.
        instruction_part: The text that starts a user's turn.
        response_part: The text that starts an assistant's turn.
        tokenizer: Replaces the trainer's tokenizer as the source of the chat template.

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
    if instruction_part is None or response_part is None:
        markers = masking.find_markers(tokenizer or trainer.processing_class)
    else:
        markers = masking.ResponseMarkers(instruction_part, response_part)
    trainer.train_on_responses(markers)
    return trainer
