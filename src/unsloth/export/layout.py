"""The layout of a checkpoint: which tensors a saved model consists of, and what they are called there.

transformers holds some weights otherwise than they are stored, such as the experts of a layer in one tensor, and
keeps the rules with the model. Here they are applied backwards layer by layer, so that a model can be written
without ever being held whole.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

_LAYER = re.compile(r"^(.*?\.\d+)\.")


def skeleton(inner: PreTrainedModel, dtype: torch.dtype, own_head: bool) -> PreTrainedModel:
    """A model like ``inner`` without adapters, quantization and values: what the merged model will be.

    Args:
        inner: The transformers model.
        dtype: Of the floating-point weights.
        own_head: Whether its output head is not tied to the embedding any more.

    Returns:
        A model on the meta device, whose ``config`` and ``generation_config`` are those to be saved.
    """
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config._name_or_path = ""
    if own_head:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        result = type(inner)(config).to(dtype)
    result.generation_config = copy.deepcopy(inner.generation_config)
    loaded_with = getattr(inner, "_weight_conversions", None)
    if loaded_with is not None:
        result._weight_conversions = [rule for rule in loaded_with if not _quantizes(rule)]
    return result


def in_checkpoint(
    skeleton: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename, split and join tensors of a model as its checkpoint has them.

    Args:
        skeleton: The model that they belong to.
        tensors: Names and values as in the model; those of one layer follow each other.

    Yields:
        Names and contiguous values as in the checkpoint. Without rules to apply, each tensor at once; else the
        tensors of one layer are held at a time.
    """
    if not _has_rules(skeleton):
        yield from tensors
        return
    held: dict[str, torch.Tensor] = {}
    current = None
    for name, tensor in tensors:
        found = _LAYER.match(name)
        layer = found[1] if found else name
        if layer != current:
            yield from _reverted(skeleton, held)
            held, current = {}, layer
        held[name] = tensor
    yield from _reverted(skeleton, held)


def _reverted(skeleton: PreTrainedModel, held: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in revert_weight_conversion(skeleton, held).items() if held else ():
        yield name, tensor.contiguous()


def _has_rules(skeleton: PreTrainedModel) -> bool:
    """Whether names or tensors of this kind of model may differ in its checkpoint."""
    rules = getattr(skeleton, "_weight_conversions", None)
    return bool(get_model_conversion_mapping(skeleton, add_legacy=False) if rules is None else rules)


def _quantizes(rule: object) -> bool:
    """Whether a loading rule reads or makes quantized weights, which the merged model does not have."""
    return isinstance(rule, WeightConverter) and any(hasattr(step, "hf_quantizer") for step in rule.operations)


@dataclass(frozen=True)
class Planned:
    """A tensor that a checkpoint will hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan(skeleton: PreTrainedModel) -> list[Planned]:
    """The tensors of the skeleton's checkpoint in the order in which they are written, each tied one once."""
    tensors = in_checkpoint(skeleton, _own_tensors(skeleton))
    return [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]


def _own_tensors(skeleton: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for path, module in skeleton.named_modules():
        own = [
            *module.named_parameters(recurse=False),
            *((n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set),
        ]
        for name, tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{path}.{name}" if path else name), tensor.detach()
