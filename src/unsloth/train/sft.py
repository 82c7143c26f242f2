"""Supervised fine-tuning, on TRL's trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer as TRLTrainer

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.data import masking
from unsloth.data.collate import Collator
from unsloth.data.encode import PrepareOptions, TrainOn
from unsloth.data.prepare import Rows, prepare
from unsloth.data.render import FormattingFunction
from unsloth.layers import fused_head, packed_attention
from unsloth.memory.budget import Budget
from unsloth.models import record
from unsloth.train import config, joining, masters, optim, setup, spellings
from unsloth.train.loop import ModelLoop

logger = get_logger(__name__)


class SFTTrainer(ModelLoop, TRLTrainer):
    """Trains a language model on texts or conversations.

    A subclass of ``trl.SFTTrainer``: its loop, losses and callbacks, with our own way from rows to batches, and with
    checkpoints that a run can rely on (:class:`unsloth.train.surviving.SurvivingTrainer`).
    Adapters are trained in float32. The mathematics is that of plain transformers and PEFT.

    Args:
        model: A model of ``FastLanguageModel``, with an adapter or loaded for full fine-tuning; a model of plain
            transformers or PEFT works too.
        args: An ``SFTConfig``, or plain ``TrainingArguments``.
        train_dataset: A data set or a list of mappings, with a text column, with conversations (``messages``),
            or with token ids (``input_ids``, optionally ``labels``).
        eval_dataset: The same, or a mapping from name to data set.
        processing_class: The tokenizer.
        tokenizer: The earlier name of ``processing_class``.
        formatting_func: Makes the text of a row; see :func:`unsloth.data.render.formatted`.
        data_collator: Replaces our collator, and with it packing and padding-free batches.
        dataset_text_field: As in ``SFTConfig``; here it takes precedence.
        max_seq_length: As in ``SFTConfig``; here it takes precedence.
        packing: As in ``SFTConfig``; here it takes precedence.
        dataset_num_proc: As in ``SFTConfig``; here it takes precedence.
        peft_config: A PEFT configuration, to add an adapter to ``model`` first.
        **more: Passed on to ``trl.SFTTrainer``; arguments that it once had itself go to ``args``.

    Raises:
        ConfigError: Arguments that contradict each other.
        DataError: Rows that cannot be trained on; names the row.
        TrainingError: The model has nothing to train.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        formatting_func: FormattingFunction | None = None,
        data_collator: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        dataset_num_proc: int | None = None,
        peft_config: PeftConfig | None = None,
        **more: Any,
    ) -> None:
        if peft_config is not None:
            model = peft.get_peft_model(model, peft_config)  # type: ignore[assignment]
        setup.check_trainable(model)
        tokenizer = setup.one_tokenizer(tokenizer, processing_class)
        own = {
            "dataset_text_field": dataset_text_field,
            "max_length": max_seq_length,
            "packing": packing,
            "dataset_num_proc": dataset_num_proc,
        }
        changes, more = spellings.trainer_arguments(TRLTrainer, config.SFTConfig, more)
        changes |= {name: value for name, value in own.items() if value is not None}
        args = config.from_training_arguments(args, config.SFTConfig, changes)
        setup.check_trackers(args)
        args.follow(record.find(model))
        args.check_tokens_per_batch(args.max_length)
        if args.tokens_per_batch is not None:
            args.packing = True
        if args.padding_free is None:
            reads_padded = data_collator or args.pad_to_multiple_of or more.get("compute_metrics")
            args.padding_free = not args.packing and not reads_padded and _keeps_rows_apart(model)
        if data_collator is not None and (args.packing or args.padding_free):
            logger.warning("a data_collator was passed: packing and padding-free batches are switched off")
            args.packing = args.padding_free = False
        self._prepare_options = PrepareOptions(
            max_length=args.max_length,
            text_field=args.dataset_text_field,
            formatting=formatting_func,
            train_on="responses" if args.assistant_only_loss else "all",
            packing=args.packing,
            padding_free=args.padding_free,
            num_proc=args.dataset_num_proc,
            layout=args.layout,  # type: ignore[arg-type] # both are checked there
            long_rows=args.long_rows,  # type: ignore[arg-type]
            escape_control_tokens=args.escape_control_tokens,
            pack_length=args.tokens_per_batch,
            cache=args.cache_tokens,
        )
        self._given = {"train": train_dataset, "eval": eval_dataset}
        if train_dataset is None:
            raise ConfigError("train_dataset is missing", got=None, do="Pass a data set or a list of mappings.")
        self._tokenizer = tokenizer
        self._eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        collator = data_collator or Collator(tokenizer.pad_token_id, args.pad_to_multiple_of)
        with masters.preserved(model), _data_is_prepared(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=self._prepared(train_dataset, "train"),
                eval_dataset=self._prepared_eval(eval_dataset),
                processing_class=tokenizer,
                data_collator=collator,
                **more,
            )
        self._fused_head = args.fused_head if args.fused_head is not None else self.model.device.type != "cpu"
        self._joins = args.join_batches if args.join_batches is not None else _adapts(model)
        self._fills = _adapts(model) and isinstance(model, PeftModel)  # whose blocks are recorded
        self._joined: joining.Joined | None = None
        self._lazy_head = _has_lazy_head(self.model)
        # The other losses of TRL exist on its fused head only.
        self._trl_head = args.loss_type != "nll" or self.label_smoother is not None or self.aux_loss_enabled
        self._trl_head |= self.compute_loss_func is not None or (self._fused_head and not self._lazy_head)
        setup.show_progress(self)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross-entropy per trained token; see ``SFTConfig.fused_head`` for how it is computed."""
        if self._trl_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        more: dict[str, Any] = {"use_cache": False}
        if self._lazy_head:
            more["return_logits"] = self.args.return_logits if self._fused_head else True
        loss, outputs = Trainer.compute_loss(
            self, model, {**inputs, **more}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._count(inputs, outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; decides which batches of the update are computed together."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        # a loss that is not divided by the tokens of the whole update would weigh them by their batches
        one = self.args.world_size == 1 and self.args.n_gpu <= 1 and not self.aux_loss_enabled
        joins = one and items is not None and joining.can_join(samples)
        most = min(joining.MOST_TOKENS, self.args.train_batch_size * (self.args.max_length or joining.MOST_TOKENS))
        fills = self._fills and not self._trl_head
        self._joined = joining.Joined(samples, most if self._joins else 0, fills=fills) if joins else None
        return samples, items

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers; a batch that a later one brings along has no loss of its own."""
        if self._joined is not None:
            inputs = self._joined.take(inputs)
            if inputs is None:
                return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # read here and not in the pass, which the GPU would have to end first
        kept = self._metrics["train"].get("mean_token_accuracy", [])
        kept[:] = [float(value) for value in kept]
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name; see ``SFTConfig.embedding_learning_rate``."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.embedding_learning_rate is not None:
            optim.separate_embeddings(optimizer, self.model, self.args.embedding_learning_rate)
        return optimizer

    def evaluate(
        self,
        eval_dataset: Rows | Mapping[str, Rows] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, on a data set of any layout that the trainer accepts; as in transformers."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared_eval(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]

    def train_on_responses(self, markers: masking.ResponseMarkers | None = None, last_only: bool = False) -> None:
        """Prepare the data sets again, with every token outside the assistant's turns masked.

        Args:
            markers: The texts that start turns; None reads whose text is whose off the chat template.
            last_only: Train only the last of the assistant's turns in each row.
        """
        train_on: TrainOn = "last_response" if last_only else "responses"
        self._prepare_options = replace(self._prepare_options, responses=markers, train_on=train_on)
        self.train_dataset = self._prepared(self._given["train"], "train")
        self.eval_dataset = self._prepared_eval(self._given["eval"])

    @torch.no_grad()
    def _count(self, inputs: dict[str, Any], logits: torch.Tensor) -> None:
        """Keep the metrics that TRL reports with its fused head: tokens seen, share predicted right."""
        mode = "train" if self.model.training else "eval"
        targets = inputs["labels"][:, 1:]
        trained = targets != masking.IGNORED
        correct = fused_head.correct_predictions(logits)
        if correct is None:
            correct = ((logits[:, :-1].argmax(-1) == targets) & trained).sum()
        accuracy = correct / trained.sum().clamp(min=1)
        self._metrics[mode]["mean_token_accuracy"].append(accuracy if mode == "train" else accuracy.item())
        if mode == "train":
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._total_train_tokens += int(seen) - (self._joined.filled if self._joined is not None else 0)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _prepared(self, rows: Any, name: str, packing: bool | None = None) -> Any:
        options = self._prepare_options
        if packing is not None:
            options = replace(options, packing=packing)
        dataset, report = prepare(rows, self._tokenizer, options)
        if report is not None:
            logger.info("%s data: %s", name, report)
        return dataset

    def _prepared_eval(self, rows: Any) -> Any:
        if rows is None:
            return None
        if isinstance(rows, Mapping):
            return {name: self._prepared(part, name, self._eval_packing) for name, part in rows.items()}
        return self._prepared(rows, "evaluation", self._eval_packing)


def _keeps_rows_apart(model: torch.nn.Module) -> bool:
    """Whether the model computes rows laid end to end as fast as rows on their own."""
    inner = record.transformers_model(model)
    return inner.device.type == "cuda" and inner.config._attn_implementation == packed_attention.NAME


def _adapts(model: torch.nn.Module) -> bool:
    """Whether the memory that a pass takes follows from what there is."""
    loaded = record.find(model)
    policy = None if loaded is None else loaded.gradient_checkpointing
    return _keeps_rows_apart(model) and (policy == "unsloth" or isinstance(policy, Budget))


def _has_lazy_head(model: torch.nn.Module) -> bool:
    """Whether the model computes head and loss together; follows a head that PEFT has wrapped while TRL set up."""
    inner = record.transformers_model(model)
    return fused_head.find(inner) is not None and fused_head.install(inner).applies


@contextlib.contextmanager
def _data_is_prepared(args: config.SFTConfig) -> Iterator[None]:
    """Keep TRL from preparing the data a second time while it builds the trainer."""
    own = {
        "dataset_kwargs": {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "padding_free": False,
        "assistant_only_loss": False,
        "completion_only_loss": False,
    }
    before = {name: getattr(args, name) for name in own}
    for name, value in own.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
