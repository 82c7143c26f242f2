"""Arguments of earlier transformers and TRL releases, translated to today's names and values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger

_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "evaluation_steps": "eval_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps",  # today a number below 1 is a share of all steps
}
# What they switched is gone, or is what happens anyway.
_WITHOUT_EFFECT = frozenset(
    {
        "chars_per_token",
        "dataset_batch_size",
        "dispatch_batches",
        "force_use_ref_model",
        "fp16_backend",
        "fp16_opt_level",
        "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap",
        "generate_during_eval",
        "half_precision_backend",
        "include_tokens_per_second",
        "is_encoder_decoder",
        "jit_mode_eval",
        "label_pad_token_id",
        "max_target_length",
        "mp_parameters",
        "num_of_sequences",
        "overwrite_output_dir",
        "padding_side",
        "padding_value",
        "past_index",
        "push_to_hub_organization",
        "ray_scope",
        "save_safetensors",
        "split_batches",
        "tpu_metrics_debug",
        "tpu_num_cores",
        "use_ipex",
        "use_legacy_prediction_loop",
        "use_liger",
        "use_mps_device",
    }
)
# None meant "not limited by this one".
_NONE_MEANS: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 3.0}

_Config = TypeVar("_Config", bound=type)

logger = get_logger(__name__)


def accepts_earlier_names(config: _Config) -> _Config:
    """Class decorator: the dataclass ``config`` also takes the arguments that earlier releases had.

    A renamed argument is passed on under today's name. One that has nothing to switch any more is ignored, which is
    logged. An unknown one raises :class:`ConfigError` with the nearest known name.

    Where there is no accelerator, ``use_cpu`` is set: without it transformers refuses ``bf16=True`` there.
    ``logging_dir`` is kept as an attribute; the trainers of this library hand it to TensorBoard.
    """
    fill = config.__init__  # type: ignore[misc]

    @functools.wraps(fill)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.logging_dir = kwargs.pop("logging_dir", None)
        given = translate(config, kwargs)
        if not torch.accelerator.is_available():
            given.setdefault("use_cpu", True)
        fill(self, *args, **given)

    config.__init__ = __init__  # type: ignore[misc]
    return config


def translate(config: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the dataclass ``config``, from ones that may have earlier names.

    Raises:
        ConfigError: An unknown name, a refused value, or two names of one argument with different values.
    """
    known = {field.name for field in dataclasses.fields(config) if field.init}
    translated: dict[str, Any] = {}
    for given, value in arguments.items():
        name = given
        if given not in known:
            name, value = _today(given, value, known)
        if value is None and name in _NONE_MEANS:
            value = _NONE_MEANS[name]
        if name in _WITHOUT_EFFECT and name not in known:
            _ignore(given, value)
            continue
        if name in translated and translated[name] != value:
            raise ConfigError(f"{name} was given twice, once as {given}", got=f"{translated[name]} and {value}")
        translated[name] = value
    return translated


def _ignore(name: str, value: Any) -> None:
    if value not in (None, False) and name != "save_safetensors":
        logger.info("%s=%r has no effect any more and is ignored", name, value)


def _today(name: str, value: Any, known: set[str]) -> tuple[str, Any]:
    """Name and value of an argument that the class does not know under its own name."""
    if name in _RENAMED:
        return _RENAMED[name], value
    if name == "group_by_length":
        return "train_sampling_strategy", "group_by_length" if value else "random"
    if name == "include_inputs_for_metrics":
        return "include_for_metrics", ["inputs"] if value else []
    if name == "adafactor":
        return "optim", "adafactor" if value else "adamw_torch_fused"
    if name == "save_safetensors" and value is False:
        raise ConfigError(
            "weights are not saved in pickle files, which can run code when they are loaded",
            got="save_safetensors=False",
            do="Leave it out.",
        )
    if name in _WITHOUT_EFFECT:
        return name, value
    near = difflib.get_close_matches(name, [*known, *_RENAMED, "group_by_length"], 1)
    raise ConfigError(
        "unknown training argument", got=name, do=f"Did you mean {near[0]}?" if near else "Check its spelling."
    )


def trainer_arguments(
    trainer: type, config: type, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort keyword arguments of a trainer: those that belong to the training arguments today, and the rest.

    Args:
        trainer: The class whose constructor takes the rest.
        config: Class of the training arguments.
        arguments: Keyword arguments as they were given.

    Raises:
        ConfigError: An argument that neither takes.
    """
    own = inspect.signature(trainer.__init__).parameters  # type: ignore[misc]
    fields = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in own:
            kept[name] = value
        elif name in fields:
            if value is not None:
                changes[name] = value
        elif name in _WITHOUT_EFFECT:
            _ignore(name, value)
        else:
            near = difflib.get_close_matches(name, [*own, *fields], 1)
            raise ConfigError(
                "unknown trainer argument", got=name, do=f"Did you mean {near[0]}?" if near else "Check its spelling."
            )
    return changes, kept
