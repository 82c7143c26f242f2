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
from unsloth.models import families, full_layers, record
from unsloth.models.spec import resolve_targets

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder block, in the words of the llama family."""

ALL_LINEAR_PATTERN = "all-linear"
"""PEFT's word for every linear layer except the output head."""

_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}

logger = get_logger(__name__)


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA hyperparameters (Hu et al., 2021, arXiv:2106.09685), under the names PEFT gives them.

    Attributes:
        r: Rank of the update ``B @ A``.
        lora_alpha: The update is scaled by ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``).
        lora_dropout: Dropout on the adapter's input.
        target_modules: Names of the layers to adapt, or ``"all-linear"``; ``lm_head`` and ``embed_tokens`` among
            them are trained in full, as one weight if they are tied. The names of the llama family stand for what
            the model's own family has in their place (``qkv_proj`` for ``q_proj`` on Phi-3). Left out, they are all
            seven, or every linear layer of a block where a family without a spec has other names.
        bias: Which biases to train: ``"none"``, ``"all"`` or ``"lora_only"``.
        layers_to_transform: Indices of the blocks to adapt; None adapts all.
        layers_pattern: Name of the module list that those indices count.
        use_rslora: Rank-stabilized scaling (arXiv:2312.03732).
        use_dora: Weight-decomposed adaptation (arXiv:2402.09353).
        modules_to_save: Modules to train in full and to save with the adapter.
        init_lora_weights: PEFT's initialization schemes.
        loftq_config: PEFT's LoftQ configuration.
        task_type: PEFT's task type; the default stands for ``"SEQ_CLS"`` where the model classifies sequences.
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
        AdapterError: The model already has an adapter, a target name matches none of its modules, or PEFT refuses.
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
    classifies = options.task_type == "CAUSAL_LM" and record.is_classifier(model)  # PEFT trains its head, then
    targets, full = _targets(model, options.target_modules)
    saved = list(dict.fromkeys([*(options.modules_to_save or ()), *full]))
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        bias=options.bias,  # type: ignore[arg-type]
        layers_to_transform=options.layers_to_transform,
        layers_pattern=options.layers_pattern,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules_to_save=saved or None,
        ensure_weight_tying=bool(full) and _is_tied(model),
        init_lora_weights=options.init_lora_weights,  # type: ignore[arg-type]
        loftq_config=options.loftq_config or {},
        task_type="SEQ_CLS" if classifies else options.task_type,
    )
    set_seed(options.random_state)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has since renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise AdapterError(
                f"PEFT refuses this adapter ({' '.join(str(error).split())[:300]})",
                got=targets,
                do="Name other target_modules: a list of the layers to adapt.",
            ) from error
    full_layers.to_float32(adapted)
    checkpointing.apply(model, options.use_gradient_checkpointing)
    return adapted


@dataclass(frozen=True)
class Parts:
    """Which parts of a model to adapt.

    Attributes:
        vision: The vision tower, where there is one.
        language: The language model.
        attention: Its attention layers.
        mlp: Its feed-forward layers, experts included.
    """

    vision: bool = True
    language: bool = True
    attention: bool = True
    mlp: bool = True


def targets_in(model: PreTrainedModel, parts: Parts, names: Iterable[str] | str | None) -> Iterable[str] | str:
    """The names of the linear layers in the chosen ``parts``; of ``names`` only, if any are given.

    Raises:
        ConfigError: The parts leave nothing to train.
    """
    if not parts.vision:
        logger.info("this model has no vision part; finetune_vision_layers has nothing to switch", extra={"once": True})
    given = None if names is None or names == ALL_LINEAR_PATTERN else names
    if parts.language and parts.attention and parts.mlp:
        return ALL_LINEAR_PATTERN if given is None else given
    if isinstance(given, str):
        raise ConfigError(
            "a pattern for target_modules goes with all parts only", got=given, do="Give a list of names."
        )
    paths = [path for path, _ in model.named_modules()]
    wanted = None if given is None else _fused(resolve_targets(families.find(model), given), paths)
    head = model.get_output_embeddings()
    chosen: list[str] = []
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if hasattr(module, "in_features") and module is not head and (wanted is None or name in wanted):
            if (parts.attention if "attn" in path or "attention" in path else parts.mlp) and parts.language:
                chosen.append(name)
    # Names of no module are kept, so that they are an error when the adapter is made.
    chosen += [name for name in wanted or () if name in full_layers.FULL or not _matches(name, paths)]
    if not chosen:
        raise ConfigError(
            "nothing is left to train", got=parts, do="Switch one of the finetune_... arguments on, or leave them out."
        )
    return list(dict.fromkeys(chosen))


def _targets(model: PreTrainedModel, names: Iterable[str] | str) -> tuple[list[str] | str, list[str]]:
    """The layers to adapt (PEFT checks a pattern), and those to train in full."""
    if isinstance(names, str):
        return names, []  # "all-linear", or a regular expression
    family = families.find(model)
    wanted = resolve_targets(family, names)
    full = [name for name in wanted if name.rsplit(".", 1)[-1] in full_layers.FULL]
    paths = [path for path, _ in model.named_modules()]
    found = _fused([name for name in wanted if name not in full], paths)
    unmatched = [name for name in [*found, *full] if not _matches(name, paths)]
    if unmatched and names is ALL_LINEAR and family is None:
        logger.info("%s has no %s; all of its linear layers are adapted", type(model).__name__, ", ".join(unmatched))
        return ALL_LINEAR_PATTERN, []
    if not found or unmatched:
        linear = sorted({p.rsplit(".", 1)[-1] for p, m in model.named_modules() if hasattr(m, "in_features")})
        raise AdapterError(
            "target_modules must name modules of this model, at least one of them besides lm_head and embed_tokens",
            got=unmatched or wanted,
            do=f"Its linear layers are: {', '.join(linear)}.",
        )
    return found, full


def _matches(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _fused(names: list[str], paths: list[str]) -> list[str]:
    """Replace the documented names by the one layer that holds them all, in models that have it (Phi)."""
    for parts, whole in _FUSED.items():
        if _matches(whole, paths):
            names = [whole if name in parts and not _matches(name, paths) else name for name in names]
    return list(dict.fromkeys(names))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
