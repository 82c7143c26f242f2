"""Load a model and its tokenizer, in the precision asked for, ready to be adapted or run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from unsloth.core import device, settings
from unsloth.core.errors import AdapterError, CheckpointError, ConfigError
from unsloth.core.log import get_logger
from unsloth.memory import allocator, checkpointing
from unsloth.models import record, source, tokenizer
from unsloth.quant import int8, nf4

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_DEFAULT_LENGTH = 2048
_SWITCHES: dict[record.Precision, str] = {
    "4bit": "load_in_4bit",
    "8bit": "load_in_8bit",
    "16bit": "load_in_16bit",
    "full": "full_finetuning",
}

logger = get_logger(__name__)


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
        more: Further arguments for transformers' ``from_pretrained``.
    """

    model_name: str
    max_seq_length: int = _DEFAULT_LENGTH
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
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < 1:
            raise ConfigError("max_seq_length must be a positive number of tokens", got=self.max_seq_length)
        checkpointing.validate(self.use_gradient_checkpointing)


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
            got=", ".join(f"{_SWITCHES[c]}=True" for c in chosen),
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


def load(options: LoadOptions) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that ``options`` describe.

    A saved adapter is loaded on top of its base model, trainable, in float32.

    Raises:
        ModelNotFoundError: There is no such folder or repository.
        NetworkError: The hub cannot be reached.
        CheckpointError: Files are missing, damaged, or do not fit the configuration.
        ConfigError: The options do not go together.
    """
    found = source.resolve(options.model_name, revision=options.revision, token=options.token)
    base = found
    if found.adapter_base is not None:
        base = source.resolve(found.adapter_base, token=options.token)
    # The revision belongs to what the user named: the adapter, if it is one.
    revision = options.revision if base is found else None
    try:
        config = AutoConfig.from_pretrained(
            base.location, revision=revision, token=options.token, trust_remote_code=options.trust_remote_code
        )
        model = _load_base(base, config, revision, options)
        loaded_tokenizer = _load_tokenizer(found, base, model, options)
    except TypeError as error:
        unknown = next((name for name in options.more if f"'{name}'" in str(error)), None)
        if unknown is None:
            raise
        near = difflib.get_close_matches(unknown, [f.name for f in fields(LoadOptions)] + list(_SWITCHES.values()), 1)
        raise ConfigError(
            "unknown argument", got=unknown, do=f"Did you mean {near[0]}?" if near else "Check its spelling."
        ) from error
    except OSError as error:
        raise source.explain_hub_error(base.name, error) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"the weights of '{base.name}' are damaged ({error})") from error
    tokenizer.share_special_tokens(model, loaded_tokenizer)
    if found.adapter_base is not None:
        return _load_adapter(model, found, options), loaded_tokenizer
    return model, loaded_tokenizer


def _load_base(
    found: source.Source, config: PretrainedConfig, revision: str | None, options: LoadOptions
) -> PreTrainedModel:
    target = _target_device(options.device_map)
    dtype = options.dtype or device.default_dtype(target)
    prequantized = getattr(config, "quantization_config", None) is not None
    weights_dtype = torch.float32 if options.precision == "full" and options.float32_mixed_precision else dtype
    with allocator.freed_at_once():
        model, info = AutoModelForCausalLM.from_pretrained(
            found.location,
            config=config,
            revision=revision,
            token=options.token,
            trust_remote_code=options.trust_remote_code,
            dtype=weights_dtype,
            device_map=_device_map(options.device_map),
            attn_implementation=options.attn_implementation,
            quantization_config=None if prequantized else _quantization(options.precision, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options.more,
        )
    _check_complete(found, info)
    nf4.keep_layout(model)
    record.attach(model, _record(model, options, dtype, prequantized))
    model.eval()
    return model


def _record(model: PreTrainedModel, options: LoadOptions, dtype: torch.dtype, prequantized: bool) -> record.LoadRecord:
    precision = options.precision
    if prequantized:
        precision = "4bit" if getattr(model, "is_loaded_in_4bit", False) else "8bit"
    return record.LoadRecord(
        name=options.model_name,
        revision=options.revision,
        precision=precision,
        dtype=dtype,
        max_seq_length=_sequence_length(model.config, options.max_seq_length),
        gradient_checkpointing=options.use_gradient_checkpointing,
        random_state=options.random_state,
    )


def _sequence_length(config: PretrainedConfig, asked: int) -> int:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is None or asked <= own:
        return asked
    if asked == _DEFAULT_LENGTH:
        logger.info("max_seq_length is %d, the longest that this model knows", own)
        return own
    raise ConfigError(
        f"max_seq_length is beyond the {own:,} positions that this model was trained for",
        got=asked,
        do=f"Use max_seq_length={own} or less, or a model with a longer context.",
    )


def _quantization(precision: record.Precision, dtype: torch.dtype) -> QuantizationConfigMixin | None:
    if precision == "4bit":
        return nf4.quantization_config(dtype)
    return int8.quantization_config() if precision == "8bit" else None


def _target_device(device_map: Any) -> torch.device:
    if isinstance(device_map, torch.device):
        return device_map
    if isinstance(device_map, str) and device_map.split(":")[0] in ("cpu", "cuda"):
        return torch.device(device_map)
    return device.default_device()


def _device_map(device_map: Any) -> Any:
    """The document's ``"sequential"`` (and everything, without a GPU) as a map that puts the model on one device."""
    target = _target_device(device_map)
    if target.type == "cpu":
        return "cpu"
    return {"": target} if device_map == "sequential" else device_map


def _check_complete(found: source.Source, info: Mapping[str, Any]) -> None:
    """Refuse a model some of whose tensors were not in its files, and would be random."""
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys") or ())
    if mismatched:
        raise CheckpointError(
            f"{len(mismatched)} tensors of '{found.name}' have another shape than its config.json says",
            got=", ".join(mismatched[:3]),
            do="The configuration and the weights do not belong together; copy or download both again.",
        )
    if not missing:
        return
    if settings.allow_uninitialized_weights():
        logger.warning("%d tensors of '%s' are missing and were initialized at random", len(missing), found.name)
        return
    raise CheckpointError(
        f"{len(missing)} tensors are missing from the files of '{found.name}'",
        got=", ".join(missing[:3]),
        do="Copy or download it again. UNSLOTH_WARN_UNINITIALIZED=0 loads it with random values instead.",
    )


def _load_tokenizer(
    found: source.Source, base: source.Source, model: PreTrainedModel, options: LoadOptions
) -> PreTrainedTokenizerBase:
    """The tokenizer of the adapter's own folder if it has one, else the base model's."""
    location = base.location
    if found is not base and found.is_local and (Path(found.location) / "tokenizer_config.json").is_file():
        location = found.location
    return tokenizer.load(
        location,
        max_seq_length=record.require(model).max_seq_length,
        fix=options.fix_tokenizer,
        revision=options.revision if base is found else None,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
    )


def _load_adapter(model: PreTrainedModel, found: source.Source, options: LoadOptions) -> PeftModel:
    try:
        adapted = PeftModel.from_pretrained(
            model, found.location, is_trainable=True, revision=options.revision, token=options.token
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"the adapter '{found.name}' does not fit its base model '{found.adapter_base}': {reason}"
        ) from error
    checkpointing.apply(model, options.use_gradient_checkpointing)
    return adapted
