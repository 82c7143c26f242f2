"""How to load a model: one validated value made of the arguments of ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unsloth.core.errors import ConfigError
from unsloth.memory import checkpointing
from unsloth.models import placement, record

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


class _Default(int):
    """A default that can be told from the same number given by the user, by identity."""


DEFAULT_LENGTH = _Default(2048)
SWITCHES: dict[record.Precision, str] = {
    "4bit": "load_in_4bit",
    "8bit": "load_in_8bit",
    "16bit": "load_in_16bit",
    "full": "full_finetuning",
}


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model; validated on construction.

    Attributes:
        model_name: A local folder, a hub id, or a saved adapter's folder or id.
        max_seq_length: Longest training sequence, in tokens.
        dtype: Dtype of computation; None chooses bfloat16 where supported.
        precision: How the base weights are held (see :func:`choose_precision`).
        float32_mixed_precision: For full fine-tuning, hold float32 weights and compute in ``dtype``.
        token: Hub token.
        device_map: As in transformers; ``"sequential"`` means the current GPU, or the CPU without one.
        fix_tokenizer: Give the tokenizer a padding token of its own.
        trust_remote_code: Whether code in the repository may run.
        use_gradient_checkpointing: Memory policy while training.
        revision: Hub revision.
        random_state: Seed of the adapters' initial values.
        attn_implementation: As in transformers.
        rope_scaling: Replaces the scaling that a longer ``max_seq_length`` would choose; see ``models/rope.py``.
        resize_model_vocab: Rows that the embedding and the head are to have at least.
        auto_model: The transformers class to load with, instead of ``AutoModelForCausalLM``.
        gguf_file: A GGUF file of the folder or repository, instead of its safetensors.
        offload_embedding: Hold the input embedding in host memory; it always is without a GPU.
        more: Further arguments for transformers' ``from_pretrained``.
    """

    model_name: str
    max_seq_length: int = DEFAULT_LENGTH
    dtype: torch.dtype | None = None
    precision: record.Precision = "4bit"
    float32_mixed_precision: bool = True
    token: str | bool | None = None
    device_map: str | Mapping[str, Any] | torch.device = "sequential"
    fix_tokenizer: bool = True
    trust_remote_code: bool = False
    use_gradient_checkpointing: checkpointing.Policy = "unsloth"
    revision: str | None = None
    random_state: int = 3407
    attn_implementation: str | None = None
    rope_scaling: Mapping[str, Any] | None = None
    resize_model_vocab: int | None = None
    auto_model: type | None = None
    gguf_file: str | None = None
    offload_embedding: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < 1:
            raise ConfigError("max_seq_length must be a positive number of tokens", got=self.max_seq_length)
        checkpointing.validate(self.use_gradient_checkpointing)
        size = self.resize_model_vocab
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError("resize_model_vocab must be a number of tokens", got=size)
        if self.auto_model is not None and not hasattr(self.auto_model, "from_pretrained"):
            raise ConfigError(
                "auto_model must be a class of transformers that loads models",
                got=self.auto_model,
                do="For example transformers.AutoModelForCausalLM, which is the default.",
            )
        placement.validate(self.device_map)


def choose_precision(
    load_in_4bit: bool | None, load_in_8bit: bool | None, load_in_16bit: bool | None, full_finetuning: bool | None
) -> record.Precision:
    """Turn the four documented switches into one choice.

    Naming none means 4-bit; naming one replaces that default; naming all that are given as False means 16-bit.

    Raises:
        ConfigError: Two are switched on.
    """
    switches: dict[record.Precision, bool | None] = {
        "4bit": load_in_4bit,
        "8bit": load_in_8bit,
        "16bit": load_in_16bit,
        "full": full_finetuning,
    }
    chosen = [precision for precision, value in switches.items() if value]
    if len(chosen) > 1:
        raise ConfigError(
            "only one precision can be chosen",
            got=", ".join(f"{SWITCHES[c]}=True" for c in chosen),
            do="Leave one of them on; the others may be left out.",
        )
    if chosen:
        return chosen[0]
    return "16bit" if load_in_4bit is False else "4bit"


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Accept a torch dtype, its name, or None; raise :class:`ConfigError` for anything else."""
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)  # type: ignore[arg-type]
    if dtype is not None and dtype not in set(_DTYPES.values()):
        raise ConfigError("unknown dtype", got=dtype, do="Use None, torch.bfloat16, torch.float16 or torch.float32.")
    return dtype  # type: ignore[return-value]
