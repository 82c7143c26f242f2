"""Telling base models apart, cheaply: names, shapes, and some of the weights.

The same base loaded in another precision has the same fingerprint within tolerance, so that an adapter trained on
NF4 weights is at home on 16-bit ones. Another model of the same shape has not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

_ADAPTER_PARTS = ("lora_", ".modules_to_save.", "trainable_tokens_")
_WRAPPERS = (".base_layer", ".original_module")
_SAMPLED_TENSORS = 16
_VALUES = 16  # of each sampled tensor
_TOLERANCE = 0.02  # relative; bfloat16 rounds by up to 0.004


@dataclass(frozen=True)
class Fingerprint:
    """What distinguishes a base model.

    Attributes:
        structure: SHA-256 of the names and logical shapes of all base weights.
        values: Elements of weights that no precision quantizes: embeddings and norms.
        storage: How the linear layers are held (dtypes and device type).
        weights: SHA-256 of elements of the linear layers as they are held; comparable where ``storage`` is equal.
            Empty if the base itself is trained.
    """

    structure: str
    values: tuple[float, ...] = field(default=())
    storage: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # lists, when read from JSON

    def difference(self, other: Fingerprint) -> str | None:
        """How another base differs, as a clause; None if it is the same one."""
        if self.structure != other.structure:
            return "its layers have other names or shapes"
        if self.values and other.values and not _close(self.values, other.values):
            return "its embeddings or norms have other values"
        if self.storage == other.storage and self.weights and other.weights and self.weights != other.weights:
            return "its linear layers have other weights"
        return None


@torch.no_grad()
def of(model: torch.nn.Module, frozen_only: bool = False) -> Fingerprint:
    """The fingerprint of the base weights below any adapter of ``model``.

    Args:
        model: A model, with or without adapters.
        frozen_only: Leave out the values of trainable weights, for a model in training.
    """
    structure = hashlib.sha256()
    weights = hashlib.sha256()
    held, stable, linear = set(), [], 0
    for name, parameter, shape, is_linear in sorted(_base_weights(model), key=lambda entry: entry[0]):
        structure.update(f"{name}:{shape};".encode())
        if (frozen_only and parameter.requires_grad) or parameter.device.type == "meta":
            continue
        if is_linear:
            linear += 1
            held.add(f"{str(parameter.dtype).removeprefix('torch.')}:{parameter.device.type}")
            weights.update(_elements(parameter).contiguous().cpu().view(torch.uint8).numpy().tobytes())
        elif parameter.is_floating_point():
            stable.append(parameter)
    step = max(len(stable) // _SAMPLED_TENSORS, 1)
    values = [value for parameter in stable[::step] for value in _elements(parameter).double().cpu().tolist()]
    return Fingerprint(
        structure=structure.hexdigest(),
        values=tuple(values),
        storage=",".join(sorted(held)),
        weights=weights.hexdigest() if linear else "",
    )


def _base_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, tuple[int, ...], bool]]:
    """Name without PEFT's wrappers, parameter, logical shape, and whether it is the matrix of a linear layer."""
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f".{path}.{leaf}"
            if any(part in name for part in _ADAPTER_PARTS):
                continue
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            is_linear = leaf == "weight" and hasattr(module, "in_features") and hasattr(module, "out_features")
            shape = (module.out_features, module.in_features) if is_linear else tuple(parameter.shape)
            yield name.removeprefix(".base_model.model").lstrip("."), parameter, shape, is_linear


def _elements(parameter: torch.Tensor) -> torch.Tensor:
    """Some elements, evenly spread over the tensor."""
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)]


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in zip(first, second, strict=True)
    )
