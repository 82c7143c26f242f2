"""The configuration objects that a run's file describes."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from unsloth.cli.methods import method_of
from unsloth.cli.run_config import RunConfig
from unsloth.core.errors import ConfigError
from unsloth.models import adapters, load, source

_SWITCHES = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")
_OUTPUT = "outputs"


def model_arguments(config: RunConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments for ``FastLanguageModel.from_pretrained``."""
    head = {"auto_model": AutoModelForSequenceClassification, "num_labels": 1} if config.method == "reward" else {}
    return {**config.model, **head, "trust_remote_code": trust_remote_code}


def load_options(config: RunConfig, trust_remote_code: bool) -> load.LoadOptions:
    """How ``FastLanguageModel.from_pretrained`` would load the model of the file.

    Raises:
        ConfigError: A value out of range.
    """
    given = model_arguments(config, trust_remote_code)
    known = {name: value for name, value in given.items() if name in load.LoadOptions.__dataclass_fields__}
    mixed = known.pop("float32_mixed_precision", True)
    return load.LoadOptions(
        **{
            **known,
            "dtype": load.parse_dtype(known.get("dtype")),
            "precision": load.choose_precision(*(config.model.get(switch) for switch in _SWITCHES)),
            "float32_mixed_precision": mixed is not False,
        }
    )


def adapter_arguments(config: RunConfig) -> dict[str, Any]:
    """Arguments for ``FastLanguageModel.get_peft_model``; the model's memory policy holds unless another is given."""
    policy = {name: config.model[name] for name in ("use_gradient_checkpointing",) if name in config.model}
    return {**policy, **(config.adapter or {})}


def adapter_options(config: RunConfig, options: load.LoadOptions) -> adapters.AdapterOptions | None:
    """The adapter to train: of the file, of the saved adapter that the model is, or none in full fine-tuning.

    Raises:
        ConfigError: A value out of range.
    """
    if config.is_full_finetuning:
        return None
    values = adapter_arguments(config)
    adapters.AdapterOptions(**values)  # what is wrong with the section is said before the hub is asked for the model
    found = source.resolve(options.model_name, revision=options.revision, token=options.token)
    if found.adapter_base is not None and found.is_local:
        values = {**_saved_adapter(Path(found.location)), **values}
    return adapters.AdapterOptions(**values)


def training_options(config: RunConfig) -> Any:
    """The hyperparameters, of the method's class.

    Defaults are those of the command line: every step is logged, results go to ``outputs``.

    Raises:
        ConfigError: transformers or TRL refuse them.
    """
    method = method_of(config)
    defaults = {"output_dir": _OUTPUT, "logging_steps": 1, "report_to": "none", **method.defaults}
    values: dict[str, Any] = {**defaults, **config.training}
    if config.data is not None and config.data.text_field:
        values["dataset_text_field"] = config.data.text_field
    try:
        return method.config(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise _refused(config, values, " ".join(str(error).split()).rstrip(".")) from error


def _refused(config: RunConfig, values: Mapping[str, Any], reason: str) -> ConfigError:
    """What transformers or TRL said against the section 'training', with the key if it was about one of its names."""
    named = re.match(r"(\S+) is not a valid \w+, please select one of \[(.*)\]", reason)
    key = next((key for key, value in values.items() if named and value == named[1]), None)
    if named is None or key is None:
        what = f"the section 'training' of {config.origin} was refused: {reason[:300]}"
        return ConfigError(what, do="Change the values it names.")
    choices = [choice.strip("' ") for choice in named[2].split(",")]
    near = difflib.get_close_matches(named[1], choices, 1)
    do = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(choices[:8])}."
    return ConfigError(f"training.{key} has an unknown value", got=named[1], do=do)


def output_folder(config: RunConfig) -> Path:
    """Where checkpoints and results go."""
    return Path(config.training.get("output_dir") or _OUTPUT).expanduser()


def _saved_adapter(folder: Path) -> Mapping[str, Any]:
    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {name: content[name] for name in ("r", "lora_alpha", "target_modules") if content.get(name)}


def precision_switch(precision: str | None) -> dict[str, Any]:
    """The argument of ``from_pretrained`` that chooses ``precision``; none for None.

    Raises:
        ConfigError: An unknown precision.
    """
    if precision is None:
        return {}
    if precision not in ("4bit", "8bit", "16bit"):
        raise ConfigError("unknown --precision", got=precision, do="Use 4bit, 8bit or 16bit.")
    return {f"load_in_{precision}": True}
