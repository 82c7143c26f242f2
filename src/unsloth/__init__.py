"""Fine-tune open language models on one GPU.

Importing this package loads nothing else and changes nothing: each public name is imported from its module when
it is first used. Using one of those in ``_BINDS`` also lets scripts import our trainers from ``trl``
(:mod:`unsloth.compat`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unsloth.api import FastLanguageModel as FastLanguageModel
    from unsloth.api import FastModel as FastModel
    from unsloth.chat_templates import CHAT_TEMPLATES as CHAT_TEMPLATES
    from unsloth.chat_templates import apply_chat_template as apply_chat_template
    from unsloth.chat_templates import construct_chat_template as construct_chat_template
    from unsloth.chat_templates import get_chat_template as get_chat_template
    from unsloth.chat_templates import standardize_data_formats as standardize_data_formats
    from unsloth.chat_templates import standardize_sharegpt as standardize_sharegpt
    from unsloth.chat_templates import to_sharegpt as to_sharegpt
    from unsloth.compat import PatchDPOTrainer as PatchDPOTrainer
    from unsloth.compat import PatchFastRL as PatchFastRL
    from unsloth.core.device import is_bfloat16_supported as is_bfloat16_supported
    from unsloth.core.errors import UnslothError as UnslothError
    from unsloth.generate.protocol import LoRARequest as LoRARequest
    from unsloth.generate.sampling import SamplingParams as SamplingParams
    from unsloth.models.vocabulary import add_new_tokens as add_new_tokens
    from unsloth.rewards.locked_down import create_locked_down_function as create_locked_down_function
    from unsloth.rewards.source_check import check_python_modules as check_python_modules
    from unsloth.rewards.time_limit import execute_with_time_limit as execute_with_time_limit
    from unsloth.train.config import SFTConfig as SFTConfig
    from unsloth.train.cpo import CPOConfig as CPOConfig
    from unsloth.train.cpo import CPOTrainer as CPOTrainer
    from unsloth.train.dpo import DPOConfig as DPOConfig
    from unsloth.train.dpo import DPOTrainer as DPOTrainer
    from unsloth.train.grpo import GRPOTrainer as GRPOTrainer
    from unsloth.train.grpo_config import GRPOConfig as GRPOConfig
    from unsloth.train.kto import KTOConfig as KTOConfig
    from unsloth.train.kto import KTOTrainer as KTOTrainer
    from unsloth.train.orpo import ORPOConfig as ORPOConfig
    from unsloth.train.orpo import ORPOTrainer as ORPOTrainer
    from unsloth.train.responses import train_on_responses_only as train_on_responses_only
    from unsloth.train.reward import RewardConfig as RewardConfig
    from unsloth.train.reward import RewardTrainer as RewardTrainer
    from unsloth.train.sft import SFTTrainer as SFTTrainer
    from unsloth.trainer import UnslothTrainer as UnslothTrainer
    from unsloth.trainer import UnslothTrainingArguments as UnslothTrainingArguments

__version__ = "0.1.0"

# Public name: (module, name in it)
_PUBLIC = {
    "CHAT_TEMPLATES": ("unsloth.chat_templates", "CHAT_TEMPLATES"),
    "FastLanguageModel": ("unsloth.api", "FastLanguageModel"),
    "FastModel": ("unsloth.api", "FastModel"),
    "LoRARequest": ("unsloth.generate.protocol", "LoRARequest"),
    "PatchDPOTrainer": ("unsloth.compat", "PatchDPOTrainer"),
    "PatchFastRL": ("unsloth.compat", "PatchFastRL"),
    "CPOConfig": ("unsloth.train.cpo", "CPOConfig"),
    "CPOTrainer": ("unsloth.train.cpo", "CPOTrainer"),
    "DPOConfig": ("unsloth.train.dpo", "DPOConfig"),
    "DPOTrainer": ("unsloth.train.dpo", "DPOTrainer"),
    "GRPOConfig": ("unsloth.train.grpo_config", "GRPOConfig"),
    "GRPOTrainer": ("unsloth.train.grpo", "GRPOTrainer"),
    "KTOConfig": ("unsloth.train.kto", "KTOConfig"),
    "KTOTrainer": ("unsloth.train.kto", "KTOTrainer"),
    "ORPOConfig": ("unsloth.train.orpo", "ORPOConfig"),
    "ORPOTrainer": ("unsloth.train.orpo", "ORPOTrainer"),
    "RewardConfig": ("unsloth.train.reward", "RewardConfig"),
    "RewardTrainer": ("unsloth.train.reward", "RewardTrainer"),
    "SFTConfig": ("unsloth.train.config", "SFTConfig"),
    "SamplingParams": ("unsloth.generate.sampling", "SamplingParams"),
    "SFTTrainer": ("unsloth.train.sft", "SFTTrainer"),
    "UnslothError": ("unsloth.core.errors", "UnslothError"),
    "UnslothTrainer": ("unsloth.trainer", "UnslothTrainer"),
    "UnslothTrainingArguments": ("unsloth.trainer", "UnslothTrainingArguments"),
    "add_new_tokens": ("unsloth.models.vocabulary", "add_new_tokens"),
    "check_python_modules": ("unsloth.rewards.source_check", "check_python_modules"),
    "create_locked_down_function": ("unsloth.rewards.locked_down", "create_locked_down_function"),
    "execute_with_time_limit": ("unsloth.rewards.time_limit", "execute_with_time_limit"),
    "apply_chat_template": ("unsloth.chat_templates", "apply_chat_template"),
    "construct_chat_template": ("unsloth.chat_templates", "construct_chat_template"),
    "get_chat_template": ("unsloth.chat_templates", "get_chat_template"),
    "is_bf16_supported": ("unsloth.core.device", "is_bfloat16_supported"),
    "is_bfloat16_supported": ("unsloth.core.device", "is_bfloat16_supported"),
    "standardize_data_formats": ("unsloth.chat_templates", "standardize_data_formats"),
    "standardize_sharegpt": ("unsloth.chat_templates", "standardize_sharegpt"),
    "to_sharegpt": ("unsloth.chat_templates", "to_sharegpt"),
    "train_on_responses_only": ("unsloth.train.responses", "train_on_responses_only"),
}

# Names that scripts use before they import trainers from trl.
_BINDS = frozenset({"FastLanguageModel", "FastModel"})

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unsloth' has no attribute '{name}'")
    importlib.import_module("unsloth.core.settings").prefer_stable_downloads()
    if name in _BINDS:
        importlib.import_module("unsloth.compat").bind()
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
