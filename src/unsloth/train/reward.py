"""Reward modelling: a score for an answer, learned from pairs; on TRL's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.reward_config import RewardConfig as TRLConfig
from trl.trainer.reward_trainer import RewardTrainer as TRLTrainer

from unsloth.core.errors import ConfigError
from unsloth.data.preference import PAIR_COLUMNS
from unsloth.data.prepare import Rows
from unsloth.losses.preference import reward_loss
from unsloth.models import record
from unsloth.train import masters, setup
from unsloth.train.preference import PreferenceArguments, PreferenceTrainer, accept
from unsloth.train.spellings import accepts_earlier_names


@accepts_earlier_names
@dataclass
class RewardConfig(PreferenceArguments, TRLConfig):
    """TRL's ``RewardConfig``, with defaults that follow the model.

    Everything of ``trl.RewardConfig`` and ``transformers.TrainingArguments`` is accepted, under today's names or those
    of earlier releases. Rows longer than ``max_length`` lose the end of the answer (TRL leaves them out).
    """


class RewardTrainer(PreferenceTrainer, TRLTrainer):
    """Trains a model with one output, the score of an answer, to score chosen answers above rejected ones.

    A subclass of ``trl.RewardTrainer``. The loss is :func:`unsloth.losses.preference.reward_loss`; a column ``margin``
    says by how much the chosen answer is better.

    Args:
        model: A sequence classification model with ``num_labels=1``, of ``FastLanguageModel.from_pretrained(...,
            auto_model=AutoModelForSequenceClassification, num_labels=1)`` or of transformers, with or without an
            adapter.
        args: A ``RewardConfig``, or plain ``TrainingArguments``.
        data_collator: Replaces TRL's collator.
        train_dataset: Pairs: a data set or a list of mappings, see :mod:`unsloth.data.preference`.
        eval_dataset: The same, or a mapping from name to data set.
        processing_class: The tokenizer.
        tokenizer: The earlier name of ``processing_class``.
        peft_config: A PEFT configuration, to add an adapter to ``model`` first; with ``modules_to_save=["score"]``.
        **more: Fields of ``RewardConfig``, over which they take precedence; the rest is passed on to
            ``trl.RewardTrainer``.

    Raises:
        ConfigError: Arguments that contradict each other, or a model without a score.
        DataError: Rows that cannot be trained on; names the row.
        TrainingError: The model has nothing to train.
    """

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
        given = accept(TRLTrainer, RewardConfig, model, args, (tokenizer, processing_class), peft_config, more)
        inner = record.transformers_model(given.model)
        if not record.is_classifier(inner) or inner.config.num_labels != 1:
            raise ConfigError(
                "a reward model has one output",
                got=f"{type(inner).__name__} with {inner.config.num_labels} labels",
                do="Load it with auto_model=AutoModelForSequenceClassification, num_labels=1.",
            )
        self.prepare_for(given)
        with masters.preserved(given.model):
            super().__init__(
                model=given.model,
                args=given.args,
                data_collator=data_collator,
                train_dataset=self.prepared(train_dataset, "train"),
                eval_dataset=self.prepared(eval_dataset, "evaluation"),
                processing_class=given.tokenizer,
                **given.more,
            )
        setup.show_progress(self)

    def prepared(self, rows: Any, name: str) -> Any:
        """As in the base, with prompt and answer as one sequence."""
        if isinstance(rows, Dataset | IterableDataset) and _is_joined(rows):
            return rows
        pairs = super().prepared(rows, name)
        if isinstance(pairs, Dataset | IterableDataset) and set(PAIR_COLUMNS) <= set(pairs.column_names or ()):
            return pairs.map(_joined, remove_columns=["prompt_ids"])
        return pairs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of pairs, the chosen half first."""
        margin = inputs.get("margin")
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**arguments, use_cache=False)
        scores = outputs.logits[..., 0].float()
        chosen, rejected = scores.chunk(2)
        losses = reward_loss(chosen, rejected, margin, center_coefficient=self.args.center_rewards_coefficient or 0.0)
        self.count_tokens(inputs)
        self.note(
            {
                "accuracy": (chosen > rejected).float(),
                "margin": chosen - rejected,
                "mean_reward": scores,
                "min_reward": scores.min(),
                "max_reward": scores.max(),
            }
        )
        return (losses.mean(), outputs) if return_outputs else losses.mean()


def _is_joined(rows: Dataset | IterableDataset) -> bool:
    columns = set(rows.column_names or ())
    return {"chosen_ids", "rejected_ids"} <= columns and not columns & {"prompt_ids", "chosen", "rejected"}


def _joined(row: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
