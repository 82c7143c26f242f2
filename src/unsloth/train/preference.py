"""What the trainers on preferences have in common: rows, log-probabilities, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.data.masking import IGNORED
from unsloth.data.preference import PreferenceOptions, PreferenceReport, prepare_pairs
from unsloth.data.prepare import Rows
from unsloth.models import record
from unsloth.train import config, setup, spellings
from unsloth.train.follow import FollowsModel
from unsloth.train.loop import ModelLoop
from unsloth.train.packed_rows import PackedRows, filled, pack
from unsloth.train.reference import AdapterFree, adapters_off
from unsloth.train.survival import SurvivalArguments
from unsloth.train.token_logprobs import TokenLogprobs

# Legend: B rows of a batch, T tokens of the longest sequence.

_Prepare = Callable[
    [Rows, PreTrainedTokenizerBase, PreferenceOptions], tuple[Dataset | IterableDataset, PreferenceReport | None]
]

_ANSWERS = "completion_mask"  # not 0 for the tokens of the answers
_MOST_WAITING = 128

logger = get_logger(__name__)


@dataclass
class PreferenceArguments(SurvivalArguments, FollowsModel):
    """Fields that the trainers on preferences have in common.

    Attributes:
        max_prompt_length: Longest prompt in tokens; a longer one loses its beginning. None keeps all of it.
        max_completion_length: Longest answer in tokens; a longer one loses its end. None keeps all of it.
        fused_head: Compute the output head at the tokens of the answers only, in chunks, so that the logits never
            exist as a whole. None means yes; False computes them. The mathematics is the same.
        packing: Lay the sequences of a batch end to end instead of padding them, and compute a prompt that two answers
            share once. None means wherever the model's attention tells them apart, which is on a GPU
            (``model.unsloth_plan`` lists it). The mathematics is the same. Reward models are always padded.
    """

    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their beginning."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Longer answers lose their end."})
    fused_head: bool | None = field(default=None, metadata={"help": "Compute no whole logits."})
    packing: bool | None = field(default=None, metadata={"help": "No padding, and shared prompts once."})


@dataclass(frozen=True)
class Given:
    """What a trainer was given, checked and in today's names.

    Attributes:
        model: The model, with the adapter that ``peft_config`` asked for.
        args: A configuration of the trainer's own kind, complete.
        tokenizer: The tokenizer.
        more: Arguments for the constructor of the class below.
    """

    model: Any
    args: Any
    tokenizer: PreTrainedTokenizerBase
    more: dict[str, Any]


def accept(
    trainer: type,
    kind: type[Any],
    model: nn.Module,
    args: TrainingArguments | None,
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    peft_config: PeftConfig | None,
    more: Mapping[str, Any],
) -> Given:
    """Check and translate what a trainer was given.

    Args:
        trainer: The class below, whose constructor takes what is left of ``more``.
        kind: Class of the configuration.
        model: The model.
        args: A configuration of any kind.
        tokenizers: ``tokenizer`` and ``processing_class``.
        peft_config: Asks for an adapter.
        more: Further keyword arguments; those that are fields of the configuration today go there.

    Raises:
        ConfigError: Arguments that are unknown or contradict each other.
        TrainingError: The model has nothing to train.
    """
    if peft_config is not None:
        model = peft.get_peft_model(model, peft_config)  # type: ignore[arg-type,assignment]
    setup.check_trainable(model)
    tokenizer = setup.one_tokenizer(*tokenizers)
    changes, more = spellings.trainer_arguments(trainer, kind, more)
    own = config.from_training_arguments(args, kind, changes)
    setup.check_trackers(own)
    own.follow(record.find(model))
    return Given(model, own, tokenizer, dict(more))


def options_of(args: Any) -> PreferenceOptions:
    """How rows become tokens, by a configuration of any of these trainers."""
    return PreferenceOptions(
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        keep_end=getattr(args, "truncation_mode", "keep_start") == "keep_end",
        num_proc=args.dataset_num_proc,
    )


class PreferenceTrainer(ModelLoop):
    """A base for trainers on preferences, before TRL's class or transformers'.

    A subclass calls :meth:`prepare_for`, its class's constructor on :meth:`prepared` rows, and
    :func:`unsloth.train.setup.show_progress`; and it computes the loss.
    """

    _prepare_rows: _Prepare = staticmethod(prepare_pairs)
    _in_pairs = True  # the second half of a batch answers the prompts of the first
    _batch: tuple[torch.Tensor, PackedRows | None, torch.Tensor] | None = None
    _waiting: list[tuple[torch.Tensor, Callable[[Any], None]]]
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    ref_model: Any

    def prepare_for(self, given: Given, reference: nn.Module | None = None) -> None:
        """What the rows and the reference need, before the constructor below is called."""
        args = given.args
        self._waiting = []
        self._tokenizer = given.tokenizer
        self._options = options_of(args)
        chunked = args.fused_head is not False
        self._policy = TokenLogprobs(given.model, chunked)
        self._packing = args.packing is not False
        self._fills = given.model.device.type == "cuda"  # where launches of similar passes are recorded
        if args.packing and not self._policy.packs:
            raise ConfigError(
                "packing needs a model whose attention tells packed sequences apart",
                got=record.transformers_model(given.model).config._attn_implementation,
                do="Leave packing out; it is used where it can be. It also needs fused_head.",
            )
        self._reference = None
        if reference is not None and not isinstance(reference, AdapterFree):
            self._reference = TokenLogprobs(reference, chunked)

    def settle_reference(self, own: bool) -> None:
        """After TRL's constructor: undo what it did to our reference, and let go of a copy that is not needed.

        Args:
            own: The reference is one of ours, not the user's.
        """
        if isinstance(self.ref_model, AdapterFree):
            self.ref_model.__dict__.pop("forward", None)  # TRL put its head around it, and the model has one already
        elif own and self.args.precompute_ref_log_probs:
            self.ref_model = self._reference = None

    def prepared(self, rows: Any, name: str) -> Any:
        """Token ids of ``rows`` (a mapping from name to rows is prepared each); logs what was counted."""
        if rows is None:
            if name == "train":
                raise ConfigError("train_dataset is missing", got=None, do="Pass a data set or a list of mappings.")
            return None
        if isinstance(rows, Mapping):
            return {key: self.prepared(part, key) for key, part in rows.items()}
        dataset, report = type(self)._prepare_rows(rows, self._tokenizer, self._options)
        if report is not None:
            logger.info("%s data: %s", name, report)
        return dataset

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """In the place of TRL's: rows are prepared by us, before TRL sees them."""
        return self.prepared(dataset, dataset_name)

    def token_logprobs(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        prefix: str = "",
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T - 1) log-probabilities of tokens under the policy, zero where they do not count.

        Args:
            model: The policy, as the training loop passes it.
            inputs: A batch with ``input_ids``, ``attention_mask`` and ``completion_mask``, each (B, T).
            prefix: Of these names.
            labels: (B, T) the tokens that count; None means those of the answers.
        """
        return self._logprobs(self._policy, model, inputs, prefix, labels)

    @torch.no_grad()
    def reference_logprobs(self, inputs: Mapping[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
        """As :meth:`token_logprobs`, under the reference."""
        reference = self.ref_model if self.ref_model is not None else self.model  # before the first step they agree
        if isinstance(reference, AdapterFree):
            with adapters_off(reference.model):
                return self._logprobs(self._policy, reference.model, inputs, prefix)
        return self._logprobs(self._reference or self._policy, reference, inputs, prefix)

    def _logprobs(
        self,
        compute: TokenLogprobs,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        prefix: str,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ids, attended, answers = (inputs[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", _ANSWERS))
        if self._batch is None or self._batch[0] is not ids:  # policy and reference see the same batch
            packs = self._packing and self._policy.packs
            packed = pack(ids, attended, answers == 0 if self._in_pairs else None) if packs else None
            packed = filled(packed) if packed is not None and self._fills else packed
            self._batch = ids, packed, ids.masked_fill(answers == 0, IGNORED)
        packed = self._batch[1] if compute.packs else None
        if labels is None:
            labels = self._batch[2]
        with self.accelerator.autocast():
            return compute(model, {"input_ids": ids, "attention_mask": attended}, labels, packed)

    def count_tokens(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Keep the number of tokens seen in training."""
        kept = self._metrics[self._mode]
        count = torch.zeros((), dtype=torch.long, device=inputs["attention_mask"].device)
        if self.model.training:
            count = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum()

        def keep(found: int) -> None:
            self._total_train_tokens += found
            kept["num_tokens"] = [self._total_train_tokens]

        self.later(count, keep)

    def note(self, values: Mapping[str, torch.Tensor]) -> None:
        """Keep the mean of each tensor for the log."""
        names, kept = list(values), self._metrics[self._mode]
        means = torch.stack([value.detach().float().mean() for value in values.values()])

        def keep(found: list[float]) -> None:
            for name, mean in zip(names, found, strict=True):
                kept[name].append(mean)

        self.later(self.accelerator.gather(means[None]).mean(0), keep)

    def later(self, tensor: torch.Tensor, keep: Callable[[Any], None]) -> None:
        """Call ``keep`` with the values of ``tensor`` (as of ``tolist``) before the next log is written.

        In the middle of a step a GPU would wait for whoever looks at them.
        """
        self._waiting.append((tensor, keep))
        if len(self._waiting) >= _MOST_WAITING:
            self.settle_notes()

    def settle_notes(self) -> None:
        """Have all that was noted among the metrics."""
        waiting, self._waiting = self._waiting, []
        for tensor, keep in waiting:
            keep(tensor.tolist())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the class below, with all that was noted."""
        self.settle_notes()
        super().log(logs, start_time)

    def note_pairs(self, rewards: tuple[torch.Tensor, torch.Tensor], logprobs: tuple[torch.Tensor, ...]) -> None:
        """Keep the rewards (B,) of chosen and rejected answers, how far apart they are, and the log-probabilities."""
        chosen, rejected = rewards
        self.note(
            {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).float(),
                "rewards/margins": chosen - rejected,
                "logps/chosen": logprobs[0],
                "logps/rejected": logprobs[1],
            }
        )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"
