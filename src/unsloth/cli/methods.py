"""The training methods that a run's file can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unsloth.cli.run_config import RunConfig
from unsloth.core.errors import ConfigError
from unsloth.data.preference import PreferenceReport, prepare_pairs, prepare_rated
from unsloth.data.sources import Rows
from unsloth.train.config import SFTConfig
from unsloth.train.cpo import CPOConfig, CPOTrainer
from unsloth.train.dpo import DPOConfig, DPOTrainer
from unsloth.train.kto import KTOConfig, KTOTrainer
from unsloth.train.orpo import ORPOConfig, ORPOTrainer
from unsloth.train.preference import options_of
from unsloth.train.sft import SFTTrainer

_TEXT_ONLY = ("text_field", "responses_only", "instruction_part", "response_part")


@dataclass(frozen=True)
class Method:
    """How one method trains.

    Attributes:
        trainer: Its class.
        config: That of its hyperparameters.
        prepare: Makes token ids of rows with preferences; None for a method that learns from texts.
        defaults: Hyperparameters of which the method has its own default.
    """

    trainer: type[Any]
    config: type[Any]
    prepare: Callable[..., Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sft": Method(SFTTrainer, SFTConfig),
    "dpo": Method(DPOTrainer, DPOConfig, prepare_pairs),
    "kto": Method(KTOTrainer, KTOConfig, prepare_rated),
    "orpo": Method(ORPOTrainer, ORPOConfig, prepare_pairs),
    "cpo": Method(CPOTrainer, CPOConfig, prepare_pairs),
    "simpo": Method(CPOTrainer, CPOConfig, prepare_pairs, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
}


@dataclass(frozen=True)
class PreferenceRows:
    """Rows with preferences as tokens, and what was counted while they were prepared."""

    rows: Dataset
    report: PreferenceReport

    @property
    def answers(self) -> list[str]:
        """The columns with answers."""
        return [name for name in ("completion_ids", "chosen_ids", "rejected_ids") if name in self.rows.column_names]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        lengths = (len(row["prompt_ids"]) + max(len(row[name]) for name in self.answers) for row in self.rows)
        return max(lengths)


def method_of(config: RunConfig) -> Method:
    """The method that the file names.

    Raises:
        ConfigError: The section 'data' asks for what this method has no use for.
    """
    method = METHODS[config.method]
    named = [name for name in _TEXT_ONLY if config.data is not None and getattr(config.data, name)]
    if method.prepare is not None and named:
        raise ConfigError(
            f"data.{named[0]} has no meaning with training.method {config.method}, which trains on answers only",
            do="Leave it out, or use training.method: sft.",
        )
    return method


def prepare(method: Method, rows: Rows, tokenizer: PreTrainedTokenizerBase, training: Any) -> PreferenceRows:
    """Rows with preferences as tokens.

    Raises:
        DataError: A row, or a column that is missing, is named.
    """
    assert method.prepare is not None
    dataset, report = method.prepare(rows, tokenizer, options_of(training))
    return PreferenceRows(dataset, report)
