"""Loading a saved adapter onto its base model, after checking that the two belong together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from unsloth.core.errors import AdapterError
from unsloth.core.log import get_logger
from unsloth.memory import checkpointing
from unsloth.models import adapter_base, adapter_config, full_layers, identity, record, vocabulary, weight_files
from unsloth.models.source import Source

_PREFIX = "base_model.model."

logger = get_logger(__name__)


def load(model: PreTrainedModel, found: Source, policy: checkpointing.Policy) -> PeftModel:
    """Put the adapter of ``found`` on its base ``model``, trainable, in float32.

    An adapter of this library carries a fingerprint of its base, which must match; of any adapter, every tensor
    must have its layer and its shape, and every adapted layer its tensors.

    Raises:
        AdapterError: The adapter belongs to another model.
    """
    folder = Path(found.location)
    tensors = weight_files.check_file(folder / adapter_config.WEIGHTS)
    saved = adapter_base.read(folder)
    _check_fingerprint(model, found, saved)
    _fit_vocabulary(model, folder, tensors)
    _check_shapes(model, found, tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted = PeftModel.from_pretrained(model, found.location, is_trainable=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _unfit(found, reason) from error
    _check_all_loaded(adapted, found, tensors)
    full_layers.to_float32(adapted)
    checkpointing.apply(model, policy)
    return adapted


def add(adapted: PeftModel, found: Source, name: str) -> None:
    """Load a further adapter beside those of ``adapted``, for inference or merging, after the same checks.

    Args:
        adapted: A model with an adapter.
        found: The further adapter, trained on the same base.
        name: What it will be called.

    Raises:
        AdapterError: It belongs to another model.
    """
    folder = Path(found.location)
    tensors = weight_files.check_file(folder / adapter_config.WEIGHTS)
    base = record.transformers_model(adapted)
    _check_fingerprint(base, found, adapter_base.read(folder))
    _check_shapes(base, found, tensors)
    try:
        adapted.load_adapter(found.location, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _unfit(found, str(error).strip().partition("\n")[0]) from error


def _check_fingerprint(model: PreTrainedModel, found: Source, saved: adapter_base.AdapterBase | None) -> None:
    mine = record.require(model).identity
    if saved is None or saved.identity is None or mine is None:
        logger.debug("the adapter '%s' has no fingerprint of its base; only shapes are checked", found.name)
        return
    differs = identity.difference(saved.identity, mine)
    if differs:
        raise _unfit(found, f"its base is another model than the one it was trained on; {differs}")


def _fit_vocabulary(model: PreTrainedModel, folder: Path, tensors: Mapping[str, weight_files.TensorHeader]) -> None:
    """Make room for an embedding and head that were saved with the adapter, and note that rows were changed."""
    trained = weight_files.read_json(folder / adapter_config.NAME).get("modules_to_save") or ()
    for name, header in tensors.items():
        layer = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if "lora_" in name or layer not in full_layers.FULL:
            continue
        vocabulary.resize(model, max(header.shape[0], vocabulary.rows(model)))
        if layer not in trained:
            vocabulary.mark_changed(model)


def _check_shapes(model: PreTrainedModel, found: Source, tensors: Mapping[str, weight_files.TensorHeader]) -> None:
    modules = dict(model.named_modules())
    for name, header in tensors.items():
        path, _, part = name.removeprefix(_PREFIX).partition(".lora_")
        if not part:
            continue
        layer = modules.get(path)
        if layer is None:
            raise _unfit(found, f"it adapts {path}, which this model does not have")
        side = {"A.weight": (1, "in_features"), "B.weight": (0, "out_features")}.get(part)
        if side is None or not hasattr(layer, side[1]):
            continue
        size = getattr(layer, side[1])
        if header.shape[side[0]] != size:
            raise _unfit(found, f"{path} takes {size} features where the adapter has {header.shape[side[0]]}")


def _check_all_loaded(adapted: PeftModel, found: Source, tensors: Mapping[str, weight_files.TensorHeader]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(name for name in expected if "lora_" in name and name not in tensors)
    if missing:
        raise _unfit(found, f"it has no weights for {missing[0].removeprefix(_PREFIX).partition('.lora_')[0]}")
    broken = [name for name, value in expected.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise AdapterError(
            f"the adapter '{found.name}' holds values that are not finite", got=broken[0], do="Train it again."
        )


def _unfit(found: Source, reason: str) -> AdapterError:
    return AdapterError(
        f"the adapter '{found.name}' does not fit its base model '{found.adapter_base}': {reason}",
        do='Check "base_model_name_or_path" in its adapter_config.json.',
    )
