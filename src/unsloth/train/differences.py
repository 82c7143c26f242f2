"""What a checkpoint's run and the run that resumes it do not have in common."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.data import fingerprint as data_fingerprint
from unsloth.models import identity as base_identity

STATES = ("optimizer", "scheduler", "rng", "scaler")
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "safetensors")
# Arguments that do not change what is learned.
_HARMLESS_STARTS = (
    "activation_checkpointing",
    "dataloader_",
    "ddp_",
    "deepspeed",
    "do_",
    "eval_",
    "fsdp",
    "gradient_checkpointing",
    "hub_",
    "include_",
    "log_",
    "logging_",
    "metric_",
    "per_device_eval",
    "push_to_hub",
    "resume_",
    "save_",
    "torch_compile",
    "trackio_",
)
_HARMLESS = frozenset(
    {
        "accelerator_config",
        "activation_offloading",
        "auto_find_batch_size",
        "batch_eval_metrics",
        "cache_tokens",
        "bf16_full_eval",
        "dataset_kwargs",
        "dataset_num_proc",
        "dataset_text_field",
        "debug",
        "disable_tqdm",
        "enable_jit_checkpoint",
        "fp16_full_eval",
        "gradient_accumulation_steps",  # these two are compared as a product
        "per_device_train_batch_size",
        "greater_is_better",
        "join_batches",
        "label_names",
        "length_column_name",
        "load_best_model_at_end",
        "local_rank",
        "max_skipped_steps",
        "output_dir",
        "parallelism_config",
        "prediction_loss_only",
        "project",
        "remove_unused_columns",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "run_name",
        "skip_memory_metrics",
        "tokens_per_pass",
        "torch_empty_cache_steps",
        "use_cache",
        "use_cpu",
    }
)
_HARMFUL = frozenset({"dataloader_drop_last"})
_ADAPTER = (
    "r",
    "target_modules",
    "modules_to_save",
    "bias",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
)
_SHAPES = frozenset({"r", "target_modules", "modules_to_save"})  # no permission makes other weights fit
# Changed in order to train on: shown, but not refused.
_LENGTH = frozenset({"max_steps", "num_train_epochs"})
_BATCH = "global_batch_size"
_ALIASES = {"per_device_train_batch_size": _BATCH, "gradient_accumulation_steps": _BATCH}

logger = get_logger(__name__)


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was: its name (as ``resume_allow`` takes it), and both values as text."""

    name: str
    before: str
    now: str


@dataclass(frozen=True)
class Identity:
    """What makes a run the run that it is.

    Attributes:
        arguments: The training arguments, without secrets, as JSON values.
        adapter: The adapter's hyperparameters; empty without one.
        data: Of the training rows as they are fed to the model.
        base: Of the weights below the adapter.
        versions: Of the packages that compute it.
    """

    arguments: dict[str, Any]
    adapter: dict[str, Any]
    data: data_fingerprint.Fingerprint
    base: base_identity.Identity
    versions: dict[str, str]

    def details(self) -> dict[str, Any]:
        """As JSON values, for a manifest."""
        return {field.name: _plain(self, field.name) for field in fields(self)}


def identify(model: torch.nn.Module, args: TrainingArguments, dataset: Any) -> Identity:
    """The identity of a run that is about to train ``model`` on ``dataset``."""
    values = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    values[_BATCH] = args.train_batch_size * args.gradient_accumulation_steps
    return Identity(
        arguments=_json(values),
        adapter=_json(_adapter(model)),
        data=data_fingerprint.of(dataset),
        base=base_identity.take(model, frozen_only=True),
        versions={
            "unsloth": sys.modules["unsloth"].__version__,
            **{name: metadata.version(name) for name in _PACKAGES},
        },
    )


def check_names(names: Iterable[str], args: TrainingArguments) -> None:
    """Raise :class:`ConfigError` unless each name is one that ``resume_allow`` knows."""
    known = {"data", "base", _BATCH, *STATES, *_ADAPTER, *(field.name for field in fields(args))}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            raise ConfigError(
                "resume_allow names something unknown",
                got=name,
                do=f'Did you mean "{near[0]}"?' if near else 'It takes "data", "base", or names of arguments.',
            )


def check(folder: Path, details: Mapping[str, Any], now: Identity, allow: Iterable[str]) -> set[str]:
    """Show how this run differs from the one that made a checkpoint; refuse what was not accepted by name.

    Args:
        folder: The checkpoint.
        details: What its manifest says.
        now: The run that is to go on from it.
        allow: Names accepted.

    Returns:
        The names that differ and were accepted.

    Raises:
        ConfigError: Something else differs. The remedy names it.
    """
    found = compare(details, now)
    allowed = {_ALIASES.get(name, name) for name in allow} | _LENGTH
    if found:
        logger.warning("this run is not quite that of %s:\n%s", folder, table(found))
    refused = [difference for difference in found if difference.name not in allowed]
    if refused:
        shown = "; ".join(f"{d.name} was {_short(d.before)}, is {_short(d.now)}" for d in refused[:4])
        more = f"; and {len(refused) - 4} more, see above" if len(refused) > 4 else ""
        names = ", ".join(f'"{d.name}"' for d in refused if d.name not in _SHAPES)
        accept = f", or accept the change: resume_allow=[{names}]" if names else ": its weights would not fit"
        raise ConfigError(f"{folder} was made by another run: {shown}{more}", do=f"Give what it was{accept}.")
    return {difference.name for difference in found}


def compare(details: Mapping[str, Any], now: Identity) -> list[Difference]:
    """Everything that matters to the result and is not as the manifest says; what only one side knows is left out."""
    found = []
    for part in ("arguments", "adapter"):
        before, current = details.get(part, {}), getattr(now, part)
        for name in sorted(before.keys() & current.keys()):
            if before[name] != current[name] and (part == "adapter" or _matters(name)):
                found.append(Difference(name, str(before[name]), str(current[name])))
    if "data" in details:
        data = data_fingerprint.Fingerprint(**details["data"])
        if data != now.data:
            found.append(Difference("data", str(data), str(now.data)))
    if "base" in details:
        base = base_identity.Identity.from_json(details["base"])
        reason = base_identity.difference(base, now.base, same_machine=True)
        if reason:
            found.append(Difference("base", "the base model of that run", f"another model: {reason}"))
    return found


def table(differences: Iterable[Difference]) -> str:
    """The differences as lines of name, earlier value, present value."""
    rows = [("", "in the checkpoint", "now"), *((d.name, _short(d.before), _short(d.now)) for d in differences)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _matters(name: str) -> bool:
    return name in _HARMFUL or not (name in _HARMLESS or name.startswith(_HARMLESS_STARTS))


def _adapter(model: torch.nn.Module) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[model.active_adapters[0]]
    values = {name: getattr(config, name) for name in _ADAPTER if hasattr(config, name)}
    return {name: sorted(value) if isinstance(value, set | list) else value for name, value in values.items()}


def _plain(identity: Identity, name: str) -> Any:
    value = getattr(identity, name)
    return value if isinstance(value, dict) else asdict(value)


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
