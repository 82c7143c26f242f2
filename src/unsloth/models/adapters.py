"""Adapters: PEFT's LoRA modules on a loaded model, with float32 weights."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import peft
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from unsloth.core.errors import AdapterError, ConfigError
from unsloth.core.log import get_logger
from unsloth.memory import checkpointing
from unsloth.models import families, record
from unsloth.models.spec import resolve_targets

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder block, in the words of the llama family."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA hyperparameters (Hu et al., 2021, arXiv:2106.09685), under the names PEFT gives them.

    Attributes:
        r: Rank of the update ``B @ A``.
        lora_alpha: The update is scaled by ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``).
        lora_dropout: Dropout on the adapter's input.
        target_modules: Names of the layers to adapt, or ``"all-linear"``. The names of the llama family stand for
            what the model's own family has in their place (``qkv_proj`` for ``q_proj`` on Phi-3).
        bias: Which biases to train: ``"none"``, ``"all"`` or ``"lora_only"``.
        layers_to_transform: Indices of the blocks to adapt; None adapts all.
        layers_pattern: Name of the module list that those indices count.
        use_rslora: Rank-stabilized scaling (arXiv:2312.03732).
        use_dora: Weight-decomposed adaptation (arXiv:2402.09353).
        modules_to_save: Modules to train in full and to save with the adapter.
        init_lora_weights: PEFT's initialization schemes.
        loftq_config: PEFT's LoftQ configuration.
        task_type: PEFT's task type.
        use_gradient_checkpointing: Memory policy while training.
        random_state: Seed of the initial values.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Iterable[str] | str = ALL_LINEAR
    bias: str = "none"
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    loftq_config: dict[str, Any] | None = None
    task_type: str = "CAUSAL_LM"
    use_gradient_checkpointing: checkpointing.Policy = "unsloth"
    random_state: int = 3407

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError("the rank r must be a positive whole number", got=self.r, do="Common: 8, 16, 32, 64.")
        if not self.lora_alpha > 0:
            raise ConfigError("lora_alpha must be positive", got=self.lora_alpha, do="Common: r, or 2 * r.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("lora_dropout must be at least 0 and below 1", got=self.lora_dropout)
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError("unknown bias", got=self.bias, do='Use "none", "all" or "lora_only".')
        checkpointing.validate(self.use_gradient_checkpointing)


def add(model: PreTrainedModel, options: AdapterOptions) -> PeftModel | PreTrainedModel:
    """Put a trainable LoRA adapter on ``model``; its weights are float32 whatever the model's dtype.

    A model loaded for full fine-tuning is returned as it is, with everything trainable.

    Raises:
        AdapterError: The model already has an adapter, or a target name matches none of its modules.
    """
    if isinstance(model, PeftModel):
        raise AdapterError(
            "the model already has an adapter",
            got=", ".join(model.peft_config),
            do="Load the base model again, or go on training the adapter that is there.",
        )
    loaded = record.require(model)
    record.attach(model, dataclasses.replace(loaded, gradient_checkpointing=options.use_gradient_checkpointing))
    if loaded.precision == "full":
        logger.info("all weights are trained (full_finetuning=True); no adapter is added")
        checkpointing.apply(model, options.use_gradient_checkpointing)
        return model
    if options.use_dora and loaded.precision == "8bit" and model.device.type == "cpu":
        raise AdapterError(
            "DoRA on 8-bit weights does not work on the CPU, where PEFT's forward pass destroys their scales",
            do="Load in 4 or 16 bits, or leave use_dora out.",
        )
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=_targets(model, options.target_modules),
        bias=options.bias,  # type: ignore[arg-type]
        layers_to_transform=options.layers_to_transform,
        layers_pattern=options.layers_pattern,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules_to_save=options.modules_to_save,
        init_lora_weights=options.init_lora_weights,  # type: ignore[arg-type]
        loftq_config=options.loftq_config or {},
        task_type=options.task_type,
    )
    set_seed(options.random_state)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has since renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = peft.get_peft_model(model, config)
    checkpointing.apply(model, options.use_gradient_checkpointing)
    return adapted


def _targets(model: PreTrainedModel, names: Iterable[str] | str) -> list[str] | str:
    """Resolve names through the family, and check that each is the name, or the end of the path, of some module."""
    if isinstance(names, str):
        return names  # "all-linear", or a regular expression, which PEFT checks
    wanted = resolve_targets(families.find(model), names)
    paths = [path for path, _ in model.named_modules()]
    unmatched = [name for name in wanted if not any(p == name or p.endswith(f".{name}") for p in paths)]
    if not wanted or unmatched:
        linear = sorted({p.rsplit(".", 1)[-1] for p, m in model.named_modules() if hasattr(m, "in_features")})
        raise AdapterError(
            "target_modules must name modules of this model",
            got=unmatched or wanted,
            do=f"Its linear layers are: {', '.join(linear)}.",
        )
    return wanted
