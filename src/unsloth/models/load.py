"""Load a model and its tokenizer, in the precision asked for, ready to be adapted or run."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from unsloth.core import device, settings
from unsloth.core.errors import CheckpointError, ConfigError, ModelError
from unsloth.core.log import get_logger
from unsloth.memory import allocator
from unsloth.models import (
    adapter_base,
    identity,
    placement,
    read_ahead,
    record,
    remote_code,
    rope,
    saved_adapter,
    source,
    tokenizer,
    vocabulary,
    weight_format,
)
from unsloth.models.options import DEFAULT_LENGTH, SWITCHES, LoadOptions, choose_precision, parse_dtype
from unsloth.quant import nf4

__all__ = ["LoadOptions", "choose_precision", "load", "parse_dtype", "read_config"]

# Arguments that say where the files come from rather than how to load them.
_OF_THE_SOURCE = ("subfolder", "cache_dir", "local_files_only", "force_download")

logger = get_logger(__name__)


def load(options: LoadOptions) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that ``options`` describe.

    A saved adapter is loaded on top of its base model, trainable, in float32.

    Raises:
        ModelNotFoundError: There is no such folder or repository.
        NetworkError: The hub cannot be reached.
        CheckpointError: Files are missing, damaged, or do not fit the configuration.
        AdapterError: A saved adapter does not fit its base model.
        TokenizerError: No tokenizer, or one whose ids the embedding does not have.
        ConfigError: The options do not go together.
    """
    found, base, saved = _sources(options)
    config, more = _configuration(base, options)
    length, scaling = _context(config, options, saved)
    loaded_tokenizer = tokenizer.load(
        tokenizer.folder_for(found.location, base.location),
        max_seq_length=length,
        fix=options.fix_tokenizer,
        trust_remote_code=options.trust_remote_code,
        template_folder=found.location,
    )
    model = _load_base(base, config, more, options)
    record.attach(
        model,
        dataclasses.replace(
            record.require(model),
            max_seq_length=length,
            base_name=base.name,
            base_revision=_base_revision(options, found, saved),
            rope=scaling,
            identity=identity.take(model),
        ),
    )
    if options.resize_model_vocab is not None:
        vocabulary.resize(model, options.resize_model_vocab)
    if options.offload_embedding:
        placement.offload_embedding(model)
    adapted = saved_adapter.load(model, found, options.use_gradient_checkpointing) if base is not found else model
    vocabulary.check(model, loaded_tokenizer)
    tokenizer.share_special_tokens(model, loaded_tokenizer)
    return adapted, loaded_tokenizer


def read_config(options: LoadOptions) -> PretrainedConfig:
    """The configuration of the model that ``options`` describe (of an adapter, its base), without its weights.

    A scaling of the positions for the sequence length is in it.

    Raises:
        UnslothError: As :func:`load`.
    """
    _, base, saved = _sources(options, weights=False)
    config, _ = _configuration(base, options)
    _context(config, options, saved)
    return config


def _sources(
    options: LoadOptions, weights: bool = True
) -> tuple[source.Source, source.Source, adapter_base.AdapterBase | None]:
    """What the user named; the base model (the same, unless that is an adapter); what the adapter says of its base."""
    found = _resolve(options.model_name, options, options.revision, weights)
    if found.adapter_base is None:
        return found, found, None
    saved = adapter_base.read(Path(found.location))
    base = _resolve(found.adapter_base, options, _base_revision(options, found, saved), weights)
    if base.adapter_base is not None:
        raise CheckpointError(
            f"the base model of '{found.name}' is an adapter itself",
            got=base.name,
            do="Merge that adapter into its base first: save_pretrained_merged.",
        )
    return found, base, saved


def _base_revision(options: LoadOptions, found: source.Source, saved: adapter_base.AdapterBase | None) -> str | None:
    """The revision given by the user belongs to what was named: the adapter, if it is one."""
    if found.adapter_base is None:
        return options.revision
    return saved.base_revision if saved is not None else None


def _resolve(name: str, options: LoadOptions, revision: str | None, weights: bool) -> source.Source:
    named = name == options.model_name
    return source.resolve(
        name,
        revision=revision,
        token=options.token,
        gguf_file=options.gguf_file if named else None,
        weights=weights,
        trust_remote_code=options.trust_remote_code,
        **{key: options.more[key] for key in _OF_THE_SOURCE if key in options.more and (named or key != "subfolder")},
    )


def _configuration(base: source.Source, options: LoadOptions) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The configuration, with those of the further arguments that are values of it; and the other arguments."""
    more = {key: value for key, value in options.more.items() if key not in _OF_THE_SOURCE}
    try:
        config, more = AutoConfig.from_pretrained(
            base.location, trust_remote_code=options.trust_remote_code, return_unused_kwargs=True, **more
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise remote_code.explain(base.name, base.location, error) from error
    remote_code.check_implementations(config, options.attn_implementation, options.trust_remote_code)
    return config, more


def _context(
    config: PretrainedConfig, options: LoadOptions, saved: adapter_base.AdapterBase | None
) -> tuple[int, rope.Scaling | None]:
    """The sequence length, and the scaling of the positions if the configuration was changed to reach it."""
    scaling = None
    if options.rope_scaling is not None:
        scaling = rope.override(config, options.rope_scaling)
    elif saved is not None and saved.rope is not None:
        scaling = saved.rope
        scaling.apply(config)
    own, asked = rope.longest(config), options.max_seq_length
    if own is None or asked <= own:
        return asked, scaling
    if asked is DEFAULT_LENGTH:
        logger.info("max_seq_length is %d, the longest that this model knows", own)
        return own, scaling
    if options.rope_scaling is not None:
        raise ConfigError(
            f"max_seq_length is beyond the {own:,} positions that rope_scaling reaches",
            got=asked,
            do="Use a larger factor, or leave rope_scaling out to have it chosen.",
        )
    scaling = rope.extend(config, asked)
    logger.info("the model's own length is %d; its positions are scaled for %d (%s)", own, asked, scaling.kind)
    return asked, scaling


def _load_base(
    found: source.Source, config: PretrainedConfig, more: Mapping[str, Any], options: LoadOptions
) -> PreTrainedModel:
    allocator.grow_segments()
    target = placement.target_device(options.device_map)
    dtype = options.dtype or device.default_dtype(target)
    form = weight_format.choose(found, options.precision)
    form.prepare(config, dtype)
    weights_dtype = torch.float32 if form.precision == "full" and options.float32_mixed_precision else dtype
    arguments = {
        "config": config,
        "dtype": weights_dtype,
        "device_map": placement.resolved(options.device_map),
        "attn_implementation": options.attn_implementation,
        "quantization_config": form.quantization(dtype),
        "output_loading_info": True,
        **more,
    }
    if options.auto_model is not None:
        set_seed(options.random_state)  # for a head that the files may not have
    with allocator.freed_at_once():
        model, info = _from_pretrained(found, form, options, arguments)
    _check_complete(found, info, model)
    if form.precision in ("4bit", "8bit"):
        _check_shapes(found, model)
    if form.stored == "bitsandbytes":
        weight_format.to_dtype(model, dtype)
    _check_finite(found, model)
    nf4.keep_layout(model)
    if not found.is_local:
        model.config._name_or_path = model.name_or_path = found.name
    record.attach(
        model,
        record.LoadRecord(
            name=options.model_name,
            revision=options.revision,
            precision=form.precision,
            dtype=dtype,
            max_seq_length=options.max_seq_length,
            gradient_checkpointing=options.use_gradient_checkpointing,
            random_state=options.random_state,
        ),
    )
    model.eval()
    return model


def _from_pretrained(
    found: source.Source, form: weight_format.WeightFormat, options: LoadOptions, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Call transformers; its refusals become ours."""
    auto: Any = options.auto_model or AutoModelForCausalLM
    try:
        if form.stored == "fp8":
            with weight_format.dequantized(found) as tensors:
                return _from_tensors(found, _model_class(auto, arguments["config"]), tensors, arguments)
        if form.stored == "plain" and _reads_ahead(found, auto, arguments):
            with read_ahead.entries(found.tensors, torch.device(arguments["device_map"][""])) as tensors:
                return _from_tensors(found, _model_class(auto, arguments["config"]), tensors, arguments)
        return auto.from_pretrained(
            found.location, trust_remote_code=options.trust_remote_code, use_safetensors=True, **arguments
        )
    except TypeError as error:
        raise _unknown_argument(options, error) or error from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"the weights of '{found.name}' are damaged ({error})") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _other_shapes(found) from error
    except (ValueError, OSError) as error:
        raise remote_code.explain(found.name, found.location, error) from error


def _reads_ahead(found: source.Source, auto: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether tensors are read for transformers: those of a class of its own, all of them for one GPU."""
    device_map = arguments["device_map"]
    one = device_map.get("") if isinstance(device_map, Mapping) and len(device_map) == 1 else None
    if not isinstance(one, torch.device) or one.type != "cuda" or not settings.read_ahead():
        return False
    if auto is not AutoModelForCausalLM or getattr(arguments["config"], "auto_map", None):
        return False
    known = type(arguments["config"]) in MODEL_FOR_CAUSAL_LM_MAPPING
    return known and bool(found.tensors) and read_ahead.can_read(found.tensors.values())


def _model_class(auto: Any, config: PretrainedConfig) -> Any:
    """The class that ``auto`` would choose; it is needed where a model is not loaded by its name."""
    if auto is not AutoModelForCausalLM:
        return auto
    architecture = (config.architectures or [""])[0]
    chosen = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), getattr(transformers, architecture, None))
    if chosen is None:
        raise ModelError("not a kind of model that tensors are read for", got=type(config).__name__)
    return chosen


def _from_tensors(
    found: source.Source, model_class: Any, tensors: dict[str, Any], arguments: Mapping[str, Any]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a folder whose tensors transformers is given as entries that are read when it uses them."""
    model, info = model_class.from_pretrained(None, state_dict=tensors, **arguments)
    if (Path(found.location) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.location)
    model.config._name_or_path = model.name_or_path = found.location
    return model, info


def _unknown_argument(options: LoadOptions, error: TypeError) -> ConfigError | None:
    unknown = next((name for name in options.more if f"'{name}'" in str(error)), None)
    if unknown is None:
        return None
    known = [field.name for field in dataclasses.fields(LoadOptions)] + list(SWITCHES.values())
    near = difflib.get_close_matches(unknown, known, 1)
    return ConfigError(
        "unknown argument", got=unknown, do=f"Did you mean {near[0]}?" if near else "Check its spelling."
    )


def _check_complete(found: source.Source, info: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a model some of whose tensors were not in its files, and would be random.

    A classifier's head is no part of a language model's files, and may be.
    """
    missing = sorted(info.get("missing_keys") or ())
    if not missing:
        return
    if record.is_classifier(model) and not any(name.startswith(f"{model.base_model_prefix}.") for name in missing):
        logger.info("'%s' has no %s: it is new, and has to be trained", found.name, ", ".join(missing))
        return
    if settings.allow_uninitialized_weights():
        logger.warning("%d tensors of '%s' are missing and were initialized at random", len(missing), found.name)
        return
    raise CheckpointError(
        f"{len(missing)} tensors are missing from the files of '{found.name}'",
        got=", ".join(missing[:3]),
        do="Copy or download it again. UNSLOTH_WARN_UNINITIALIZED=0 loads it with random values instead.",
    )


def _check_shapes(found: source.Source, model: PreTrainedModel) -> None:
    """Compare every parameter with an empty model's; transformers does so for weights that are not quantized."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        empty = type(model)(config)
    loaded = dict(model.named_parameters())
    for name, parameter in empty.named_parameters():
        if name in loaded and identity.shape_of(loaded[name]) != list(parameter.shape):
            raise _other_shapes(found, name)


def _other_shapes(found: source.Source, name: str = "") -> CheckpointError:
    return CheckpointError(
        f"tensors of '{found.name}' have another shape than its config.json says{f' ({name})' if name else ''}",
        do="The configuration and the weights do not belong together; copy or download both again.",
    )


@torch.no_grad()
def _check_finite(found: source.Source, model: PreTrainedModel) -> None:
    """Refuse weights that are NaN or infinite; of quantized ones, the scales are looked at."""
    ranges: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        for tensor in _checked_tensors(parameter):
            if not tensor.is_meta and tensor.numel():
                # Minimum and maximum: NaN and infinity show in them, they cannot overflow, and nothing is copied.
                ends = torch.stack(torch.aminmax(tensor)).float()
                ranges.setdefault(tensor.device, []).append((name, ends))
    for entries in ranges.values():
        finite = torch.isfinite(torch.stack([ends for _, ends in entries])).all(dim=1).tolist()
        broken = [name for (name, _), good in zip(entries, finite, strict=True) if not good]
        if broken:
            raise CheckpointError(
                f"{len(broken)} tensors of '{found.name}' hold values that are not finite (NaN or infinity)",
                got=", ".join(broken[:3]),
                do="Copy or download it again; if it stays so, the model itself is broken.",
            )


def _checked_tensors(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        # The offset is the mean of all blocks' scales, so that it shows one that is not finite.
        scales = [state.absmax] if not state.nested else [state.offset, state.state2.absmax]
        return [scale for scale in scales if isinstance(scale, torch.Tensor)]
    scale = getattr(parameter, "SCB", None)
    if scale is not None:
        return [scale]
    return [parameter] if parameter.is_floating_point() else []
