"""What every trainer of this library does around a run and around an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from unsloth.core.device import is_bfloat16_supported
from unsloth.models import modes, record
from unsloth.train import optim
from unsloth.train.surviving import SurvivingTrainer


class ModelLoop(SurvivingTrainer):
    """A base for trainers, before TRL's class: ``class SFTTrainer(ModelLoop, trl.SFTTrainer)``.

    Checkpoints are those of :class:`unsloth.train.surviving.SurvivingTrainer`.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, in the mode and with the memory policy that the model was given; as in transformers."""
        loaded = record.find(self.model)
        if loaded is not None:
            # The arguments say whether to checkpoint, the model says how.
            modes.for_training(self.model, self.args.gradient_checkpointing and (loaded.gradient_checkpointing or True))
            if isinstance(self.train_dataset, Dataset) and "input_ids" in self.train_dataset.column_names:
                record.keep_rows(self.model, self.train_dataset)
        return super().train(*args, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As in transformers, except that ``adamw_8bit`` on a GPU is ours; ``adamw_bnb_8bit`` stays bitsandbytes'."""
        found, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optim.faster(args.optim, found, options, torch.cuda.is_available() and not args.use_cpu)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, except that ``fp16_full_eval`` and ``bf16_full_eval`` never convert the weights.

        Converted adapters would come back from an evaluation without the digits that 16 bits cannot hold. Computing
        under autocast saves the same memory for activations.
        """
        flags = {"fp16_full_eval": self.args.fp16_full_eval, "bf16_full_eval": self.args.bf16_full_eval}
        for name in flags:
            setattr(self.args, name, False)
        dtype = torch.bfloat16 if is_bfloat16_supported() else torch.float16
        halved = any(flags.values()) and self.model.device.type != "cpu"
        try:
            with torch.autocast(self.model.device.type, dtype, enabled=halved):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            for name, value in flags.items():
                setattr(self.args, name, value)
