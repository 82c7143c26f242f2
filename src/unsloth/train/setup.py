"""What every trainer of this library checks before it is built, and puts in place afterwards."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations

from unsloth.core.errors import ConfigError, TrainingError
from unsloth.quant import nf4
from unsloth.train.progress import TrainingProgress


def one_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, processing_class: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer, given under either of its names."""
    if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
        raise ConfigError("tokenizer and processing_class are two names of one argument", do="Give one of them.")
    found = tokenizer or processing_class
    if not isinstance(found, PreTrainedTokenizerBase):
        raise ConfigError(
            "the trainer needs the tokenizer that was loaded with the model",
            got=type(found).__name__,
            do="Pass tokenizer=tokenizer.",
        )
    return found


def check_trackers(args: TrainingArguments) -> None:
    """Raise :class:`ConfigError` if ``report_to`` names a tracker that is not installed."""
    missing = sorted(set(args.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise ConfigError(
            "report_to names a tracker that is not installed",
            got=missing[0],
            do=f'Install it (pip install {missing[0]}), or pass report_to="none".',
        )


def check_trainable(model: torch.nn.Module) -> None:
    """Raise unless the model has something to train, in a form that can be trained; sees to it that it stays so."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            "the trainer needs a loaded model", got=model, do="Load it with FastLanguageModel.from_pretrained."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "the model has no trainable weights",
            do="Add an adapter with FastLanguageModel.get_peft_model, or load it with full_finetuning=True.",
        )
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if quantized and not isinstance(model, PeftModel):
        raise TrainingError(
            "a quantized model cannot be trained itself",
            do="Add an adapter with FastLanguageModel.get_peft_model.",
        )
    nf4.keep_layout(model)


def show_progress(trainer: Trainer, progress: TrainingProgress | None = None) -> None:
    """Exchange transformers' progress bar for ``progress`` (None: our bar), and tell TensorBoard its folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and getattr(trainer.args, "logging_dir", None) is not None:
            callback.logging_dir = trainer.args.logging_dir
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress or TrainingProgress())
