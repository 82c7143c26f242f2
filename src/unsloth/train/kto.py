"""Kahneman-Tversky optimization, on TRL's trainer: answers that are good or bad, without pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.trainer.kto_config import KTOConfig as TRLConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.kto_trainer import KTOTrainer as TRLTrainer

from unsloth.core.errors import ConfigError, DataError
from unsloth.data.preference import prepare_rated
from unsloth.data.prepare import Rows
from unsloth.losses.preference import kto_divergence, kto_loss
from unsloth.train import masters, setup
from unsloth.train.preference import PreferenceArguments, PreferenceTrainer, accept
from unsloth.train.reference import reference_of
from unsloth.train.spellings import accepts_earlier_names


@accepts_earlier_names
@dataclass
class KTOConfig(PreferenceArguments, TRLConfig):
    """TRL's ``KTOConfig``, with defaults that follow the model.

    Everything of ``trl.KTOConfig`` and ``transformers.TrainingArguments`` is accepted, under today's names or those of
    earlier releases, and the fields of :class:`unsloth.train.preference.PreferenceArguments`.

    Attributes:
        train_sampling_strategy: Any of transformers'; by default rows are shuffled. (TRL asks for ``"sequential"``,
            because it fixes beforehand which answers the divergence is estimated on. Here they are the other answers
            of the batch at hand.)
    """

    train_sampling_strategy: str = field(default="random", metadata={"help": "Order of the rows."})


@dataclass
class MismatchingCollator(DataCollatorForUnpairedPreference):
    """TRL's collator, which here also puts each prompt together with the answer of the row before.

    On these mismatched sequences, named ``KL_...``, the divergence to the reference is estimated.

    Attributes:
        mismatch: Whether to.
    """

    mismatch: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with ``prompt_ids``, ``completion_ids`` and ``label``; see TRL's class for the result."""
        if self.mismatch:
            examples = [
                {**row, "KL_completion_ids": examples[i - 1]["completion_ids"]} for i, row in enumerate(examples)
            ]
        return super().torch_call(examples)


class KTOTrainer(PreferenceTrainer, TRLTrainer):
    """Trains a model on answers that are rated good or bad, relative to a reference model.

    A subclass of ``trl.KTOTrainer``, as :class:`unsloth.train.dpo.DPOTrainer` is of ``trl.DPOTrainer``. Batches need
    at least two rows. Pairs are taken apart into one good and one bad answer.

    Args:
        model: As in :class:`unsloth.train.dpo.DPOTrainer`.
        ref_model: As there.
        args: A ``KTOConfig``, or plain ``TrainingArguments``.
        data_collator: Replaces :class:`MismatchingCollator`.
        train_dataset: Rated answers or pairs: a data set or a list of mappings, see :mod:`unsloth.data.preference`.
        eval_dataset: The same, or a mapping from name to data set.
        processing_class: The tokenizer.
        tokenizer: The earlier name of ``processing_class``.
        peft_config: A PEFT configuration, to add an adapter to ``model`` first.
        **more: Fields of ``KTOConfig``, over which they take precedence; the rest is passed on to ``trl.KTOTrainer``.

    Raises:
        ConfigError: Arguments that contradict each other, or batches of one row.
        DataError: Rows that cannot be trained on (names the row), or all rated alike.
        TrainingError: The model has nothing to train.
    """

    _prepare_rows = staticmethod(prepare_rated)
    _in_pairs = False

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
        given = accept(TRLTrainer, KTOConfig, model, args, (tokenizer, processing_class), peft_config, more)
        _check(given.args)
        reference = reference_of(given.model) if ref_model is None else ref_model
        self.prepare_for(given, reference)
        pad = given.tokenizer.pad_token_id
        collator = MismatchingCollator(
            pad_token_id=given.tokenizer.eos_token_id if pad is None else pad,
            max_length=given.args.max_length,
            pad_to_multiple_of=given.args.pad_to_multiple_of,
            mismatch=given.args.loss_type == "kto",
        )
        with masters.preserved(given.model), _order_is_fixed(given.args):
            super().__init__(
                model=given.model,
                ref_model=reference,
                args=given.args,
                data_collator=data_collator or collator,
                train_dataset=self.prepared(train_dataset, "train"),
                eval_dataset=self.prepared(eval_dataset, "evaluation"),
                processing_class=given.tokenizer,
                **given.more,
            )
        self.settle_reference(own=ref_model is None)
        setup.show_progress(self)

    def prepared(self, rows: Any, name: str) -> Any:
        """As in the base; rows to train on must have both ratings.

        Raises:
            DataError: Rows that cannot be trained on, or all of them rated alike.
        """
        dataset = super().prepared(rows, name)
        if name == "train" and isinstance(dataset, Dataset) and len(set(dataset["label"][:])) < 2:
            said = "good" if dataset[0]["label"] else "bad"
            raise DataError(
                f"all {len(dataset)} answers are rated {said}, but KTO learns from the difference to the others",
                do="Add answers of the other kind, or train on good ones alone with SFTTrainer.",
            )
        return dataset

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, None]:
        """Log-probabilities (B,) of the answers under the reference."""
        return self.reference_logprobs(inputs).sum(dim=1), None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The loss of a batch of rated answers; TRL's own where it needs what only TRL computes."""
        if self.aux_loss_enabled or self._is_vision_dataset or return_outputs:
            return super()._compute_loss(model, inputs, return_outputs)
        kl = torch.zeros((), device=inputs["label"].device)
        if self.calculate_KL:
            with torch.no_grad():
                mismatched = self.token_logprobs(model, inputs, "KL_").sum(dim=1)
            reference = self.reference_logprobs(inputs, "KL_").sum(dim=1)
            kl = kto_divergence(self.accelerator.gather(mismatched), self.accelerator.gather(reference))
        reference = inputs["ref_logps"] if self.precompute_ref_logps else self.compute_ref_log_probs(model, inputs)[0]
        logprobs = self.token_logprobs(model, inputs).sum(dim=1)
        good = inputs["label"].bool()
        losses = kto_loss(
            logprobs,
            reference,
            good,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            loss_type=self.loss_type,
        )
        self.count_tokens(inputs)
        self._note(kl, self.beta * (logprobs - reference).detach(), logprobs.detach(), good)
        return losses.mean()

    def _note(self, kl: torch.Tensor, rewards: torch.Tensor, logprobs: torch.Tensor, good: torch.Tensor) -> None:
        """Keep means over the good and over the bad answers of all processes; rewards and log-probabilities (B,)."""
        self.note({"kl": kl})
        sums = torch.stack(
            [
                torch.stack([part.float().sum() for part in (side, rewards * side, logprobs * side)])
                for side in (good, ~good)
            ]
        )
        sums = self.accelerator.gather(sums[None]).sum(dim=0)
        kept = self._metrics[self._mode]

        def keep(found: list[list[float]]) -> None:
            for name, (count, reward, logprob) in zip(("chosen", "rejected"), found, strict=True):
                if count:
                    kept[f"rewards/{name}"].append(reward / count)
                    kept[f"logps/{name}"].append(logprob / count)
            if all(count for count, _, _ in found):
                kept["rewards/margins"].append(kept["rewards/chosen"][-1] - kept["rewards/rejected"][-1])

        self.later(sums, keep)


def _check(args: KTOConfig) -> None:
    if args.loss_type not in ("kto", "apo_zero_unpaired"):
        raise ConfigError("loss_type must be kto or apo_zero_unpaired", got=args.loss_type)
    if args.loss_type != "kto":
        return
    if args.per_device_train_batch_size < 2:
        raise ConfigError(
            "KTO estimates a divergence from the other answers of a batch, and needs at least two",
            got=args.per_device_train_batch_size,
            do="Set per_device_train_batch_size=2 or more (and fewer gradient_accumulation_steps).",
        )
    if args.precompute_ref_log_probs:
        raise ConfigError(
            "with KTO, the reference's log-probabilities cannot be computed beforehand: they depend on the batch",
            got="precompute_ref_log_probs=True",
            do='Leave it out; with an adapter the reference takes no memory. Or use loss_type="apo_zero_unpaired".',
        )


@contextlib.contextmanager
def _order_is_fixed(args: KTOConfig) -> Iterator[None]:
    """Answer TRL's demand for sequential rows while it builds the trainer; our collator does without."""
    strategy = args.train_sampling_strategy
    args.train_sampling_strategy = "sequential"
    try:
        yield
    finally:
        args.train_sampling_strategy = strategy
