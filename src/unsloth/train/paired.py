"""Training on pairs without a reference model: the trainer that ORPO and CPO share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.training_args import TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import disable_dropout_in_model

from unsloth.data.preference import PAIR_COLUMNS
from unsloth.data.prepare import Rows
from unsloth.train import setup
from unsloth.train.preference import PreferenceArguments, PreferenceTrainer, accept


@dataclass
class PairedArguments(PreferenceArguments, TrainingArguments):
    """Training arguments that ORPO and CPO share: those of transformers, with TRL's defaults, and these.

    Attributes:
        beta: Weight of the preference; see the losses.
        disable_dropout: Train without dropout.
        dataset_num_proc: Worker processes for tokenizing.
        pad_to_multiple_of: Round the length of a batch up to a multiple of this.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the preference."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Worker processes for tokenizing."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Round the length of batches up."})


class PairedTrainer(PreferenceTrainer):
    """A trainer on pairs, on that of transformers; a subclass has the loss.

    Args:
        model: A model of ``FastLanguageModel``, with an adapter or loaded for full fine-tuning; a model of plain
            transformers or PEFT works too.
        args: A configuration of this trainer, or plain ``TrainingArguments``.
        data_collator: Replaces TRL's collator.
        train_dataset: Pairs: a data set or a list of mappings, see :mod:`unsloth.data.preference`.
        eval_dataset: The same, or a mapping from name to data set.
        processing_class: The tokenizer.
        tokenizer: The earlier name of ``processing_class``.
        peft_config: A PEFT configuration, to add an adapter to ``model`` first.
        **more: Fields of the configuration, over which they take precedence; the rest is passed on to
            ``transformers.Trainer``.

    Raises:
        ConfigError: Arguments that contradict each other.
        DataError: Rows that cannot be trained on; names the row.
        TrainingError: The model has nothing to train.
    """

    loss_is_scaled_for_ga = False
    config_class: ClassVar[type[PairedArguments]]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **more: Any,
    ) -> None:
        given = accept(Trainer, self.config_class, model, args, (tokenizer, processing_class), peft_config, more)
        self.check(given.args)
        self.prepare_for(given)
        if given.args.disable_dropout:
            disable_dropout_in_model(given.model)
        pad = given.tokenizer.pad_token_id
        collator = DataCollatorForPreference(
            pad_token_id=given.tokenizer.eos_token_id if pad is None else pad,
            pad_to_multiple_of=given.args.pad_to_multiple_of,
        )
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0
        super().__init__(
            model=given.model,
            args=given.args,
            data_collator=data_collator or collator,
            train_dataset=self.prepared(train_dataset, "train"),
            eval_dataset=self.prepared(eval_dataset, "evaluation"),
            processing_class=given.tokenizer,
            **given.more,
        )
        self.model_accepts_loss_kwargs = False  # transformers before 5.19 asks this instead of loss_is_scaled_for_ga
        setup.show_progress(self)

    def check(self, args: Any) -> None:
        """Raise :class:`ConfigError` if the configuration makes no sense for this loss."""

    def loss_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch of pairs, the chosen half first; keeps what is to be logged."""
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in transformers; there are no outputs beside the loss."""
        loss = self.loss_of(model, inputs)
        self.count_tokens(inputs)
        return (loss, {}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate, on rows of any layout that the trainer accepts; as in transformers."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepared(eval_dataset, "evaluation")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was kept since the last log; as in transformers."""
        self.settle_notes()
        kept = self._metrics[self._mode]
        prefix = "" if self.model.training else "eval_"
        logs.update({f"{prefix}{name}": sum(values) / len(values) for name, values in kept.items()})
        super().log(logs, start_time)
        kept.clear()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a batch; there are no predictions beside it."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the collator reads."""
        self._signature_columns = list(PAIR_COLUMNS)
