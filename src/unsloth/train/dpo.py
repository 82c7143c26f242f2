"""Direct preference optimization, on TRL's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.dpo_config import DPOConfig as TRLConfig
from trl.trainer.dpo_trainer import DPOTrainer as TRLTrainer

from unsloth.data.prepare import Rows
from unsloth.losses.preference import DPOOptions, Pairs, check_dpo, dpo_loss
from unsloth.train import masters, setup
from unsloth.train.preference import PreferenceArguments, PreferenceTrainer, accept
from unsloth.train.reference import reference_of
from unsloth.train.spellings import accepts_earlier_names


@accepts_earlier_names
@dataclass
class DPOConfig(PreferenceArguments, TRLConfig):
    """TRL's ``DPOConfig``, with defaults that follow the model.

    Everything of ``trl.DPOConfig`` and ``transformers.TrainingArguments`` is accepted, under today's names or those of
    earlier releases, and the fields of :class:`unsloth.train.preference.PreferenceArguments`. ``label_smoothing`` holds
    for ``loss_type="sigmoid"`` too.
    """

    @property
    def loss_options(self) -> DPOOptions:
        """The hyperparameters of the loss."""
        return DPOOptions(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            divergence=self.f_divergence_type,
            alpha=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
        )


class DPOTrainer(PreferenceTrainer, TRLTrainer):
    """Trains a model to prefer the chosen answers over the rejected ones, relative to a reference model.

    A subclass of ``trl.DPOTrainer`` with our own way from rows to tokens and from hidden states to log-probabilities.
    Adapters are trained in float32.

    Args:
        model: A model of ``FastLanguageModel``, with an adapter or loaded for full fine-tuning; a model of plain
            transformers or PEFT works too.
        ref_model: The reference. None means the model itself without its adapter, or a copy where there is none.
        args: A ``DPOConfig``, or plain ``TrainingArguments``.
        data_collator: Replaces TRL's collator.
        train_dataset: Pairs: a data set or a list of mappings, see :mod:`unsloth.data.preference`.
        eval_dataset: The same, or a mapping from name to data set.
        processing_class: The tokenizer.
        tokenizer: The earlier name of ``processing_class``.
        peft_config: A PEFT configuration, to add an adapter to ``model`` first.
        **more: ``beta``, ``max_length``, ``max_prompt_length`` and other fields of ``DPOConfig``, over which they take
            precedence; the rest is passed on to ``trl.DPOTrainer``.

    Raises:
        ConfigError: Arguments that contradict each other.
        DataError: Rows that cannot be trained on; names the row.
        TrainingError: The model has nothing to train.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
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
        given = accept(TRLTrainer, DPOConfig, model, args, (tokenizer, processing_class), peft_config, more)
        if isinstance(given.args.loss_type, str):
            given.args.loss_type = [given.args.loss_type]
        check_dpo(given.args.loss_type, given.args.loss_options)
        reference = reference_of(given.model) if ref_model is None else ref_model
        self.prepare_for(given, reference)
        with masters.preserved(given.model):
            super().__init__(
                model=given.model,
                ref_model=reference,
                args=given.args,
                data_collator=data_collator,
                train_dataset=self.prepared(train_dataset, "train"),
                eval_dataset=self.prepared(eval_dataset, "evaluation"),
                processing_class=given.tokenizer,
                **given.more,
            )
        self.settle_reference(own=ref_model is None)
        setup.show_progress(self)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of chosen and rejected answers under the reference, (B,) each."""
        return self._sums(self.reference_logprobs(inputs), inputs).chunk(2)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The loss of a batch of pairs, the chosen half first; TRL's own where it needs what only TRL computes."""
        if self.use_weighting or self.aux_loss_enabled or self._is_vision_dataset or return_outputs:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:  # before the policy, whose activations would be in memory at the same time
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model, inputs)
        tokens = self.token_logprobs(model, inputs)
        chosen, rejected = self._sums(tokens, inputs).chunk(2)
        lengths = inputs["completion_mask"].sum(dim=1).chunk(2)
        pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, *lengths)
        weights = self.loss_weights
        loss = sum(
            weight * self._loss_of(name, pairs, tokens) for name, weight in zip(self.loss_types, weights, strict=True)
        )
        self.count_tokens(inputs)
        self.note_pairs((self.beta * pairs.chosen_ratio, self.beta * pairs.rejected_ratio), (chosen, rejected))
        return loss

    def _loss_of(self, name: str, pairs: Pairs, tokens: torch.Tensor) -> torch.Tensor:
        if name == "sft":  # of all tokens, also where ld_alpha weighs them
            pairs = Pairs(**{**vars(pairs), "chosen": tokens.sum(dim=1).chunk(2)[0]})
        return dpo_loss(pairs, name, self.args.loss_options).mean()

    def _sums(self, tokens: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Sequence log-probabilities (2B,) from those of tokens (2B, T - 1).

        With ``ld_alpha``, tokens beyond the length of the shorter answer count that much (arXiv:2409.06411).
        """
        if self.ld_alpha is None:
            return tokens.sum(dim=1)
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = mask.sum(dim=1).chunk(2)
        shared = torch.minimum(chosen, rejected).repeat(2)[:, None]
        return (tokens * torch.where(mask.cumsum(dim=1) <= shared, 1.0, self.ld_alpha)).sum(dim=1)
