"""The training methods that a run's file can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unsloth.cli.run_config import RunConfig
from unsloth.core.errors import ConfigError
from unsloth.data.formats import template_variables
from unsloth.data.preference import PreferenceReport, prepare_pairs, prepare_rated
from unsloth.data.sources import Rows
from unsloth.train import reward_names
from unsloth.train.config import SFTConfig
from unsloth.train.cpo import CPOConfig, CPOTrainer
from unsloth.train.dpo import DPOConfig, DPOTrainer
from unsloth.train.grpo import GRPOTrainer
from unsloth.train.grpo_config import GRPOConfig
from unsloth.train.kto import KTOConfig, KTOTrainer
from unsloth.train.orpo import ORPOConfig, ORPOTrainer
from unsloth.train.preference import options_of
from unsloth.train.prompt_rows import encode_prompt, prompt_rows
from unsloth.train.reward import RewardConfig, RewardTrainer
from unsloth.train.sft import SFTTrainer

_TEXT_ONLY = ("text_field", "responses_only", "instruction_part", "response_part")


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


@dataclass(frozen=True)
class PromptReport:
    """What is known of prompts."""

    rows: int

    def __str__(self) -> str:
        return f"{self.rows:,} prompts"


@dataclass(frozen=True)
class PromptRows:
    """Rows with prompts as the trainer takes them.

    Attributes:
        rows: The rows.
        report: Their number.
        first: Tokens of the first prompt.
        longest: Tokens of the longest.
    """

    rows: Dataset
    report: PromptReport
    first: list[int]
    longest: int


def _preferences(make: Callable[..., Any], rows: Rows, tokenizer: PreTrainedTokenizerBase, training: Any) -> Any:
    """Rows with preferences as tokens."""
    dataset, report = make(rows, tokenizer, options_of(training))
    return PreferenceRows(dataset, report)


def _prompts(rows: Rows, tokenizer: PreTrainedTokenizerBase, training: Any) -> PromptRows:
    """Rows with prompts, and how long those are; the reward functions must be there."""
    for entry in training.reward_functions or ():
        reward_names.find(entry)
    if not training.reward_functions:
        raise ConfigError(
            "the section 'training' names no reward functions",
            do="Add reward_functions: [correctness], or [rewards.py:my_function].",
        )
    dataset = prompt_rows(rows)
    lengths = []
    first: list[int] = []
    for row in dataset:
        ids = encode_prompt(row["prompt"], tokenizer, template_variables(row))
        first = first or ids
        lengths.append(len(ids))
    return PromptRows(dataset, PromptReport(len(dataset)), first, max(lengths))


@dataclass(frozen=True)
class Method:
    """How one method trains.

    Attributes:
        trainer: Its class.
        config: That of its hyperparameters.
        prepare: Checks rows with preferences or prompts, and makes token ids of them; None for a method that learns
            from texts.
        defaults: Hyperparameters of which the method has its own default.
    """

    trainer: type[Any]
    config: type[Any]
    prepare: Callable[[Rows, PreTrainedTokenizerBase, Any], PreferenceRows | PromptRows] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sft": Method(SFTTrainer, SFTConfig),
    "dpo": Method(DPOTrainer, DPOConfig, partial(_preferences, prepare_pairs)),
    "grpo": Method(GRPOTrainer, GRPOConfig, _prompts),
    "kto": Method(KTOTrainer, KTOConfig, partial(_preferences, prepare_rated)),
    "reward": Method(RewardTrainer, RewardConfig, partial(_preferences, prepare_pairs)),
    "orpo": Method(ORPOTrainer, ORPOConfig, partial(_preferences, prepare_pairs)),
    "cpo": Method(CPOTrainer, CPOConfig, partial(_preferences, prepare_pairs)),
    "simpo": Method(
        CPOTrainer,
        CPOConfig,
        partial(_preferences, prepare_pairs),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
    ),
}


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
