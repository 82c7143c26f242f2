"""A base model recognized by its weights, so that an adapter is not put on another one of the same shape.

The names and shapes of all parameters, and a few values of each that is never quantized: norms, biases, embeddings.
Those are the same whether a model is loaded in 4, 8 or 16 bits. Two of the linear layers are sampled too, and
compared closely if neither side is quantized. What differs from its original in other linear layers only, such as a
model that LoRA was merged into, is told apart if those two differ and neither side is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from unsloth.quant import int8, nf4

_DEQUANTIZE = {"Params4bit": nf4.dequantize, "Int8Params": int8.dequantize}
_VALUES_1D, _ROWS, _COLUMNS = 4, 32, 4
_RELATIVE = 2.0**-7  # two roundings to bfloat16
_ABSOLUTE = 1e-4  # of the largest value sampled from a tensor: below it, float16 may have lost it
_ALIKE = 0.9  # cosine of a quantized weight and the original; of two different weights it is near 0


@dataclass(frozen=True)
class Identity:
    """What a base model is recognized by.

    Attributes:
        shapes: Shape of each parameter, as if not quantized, by its name.
        exact: Sampled values of parameters that are never quantized, by name.
        linear: Sampled values of some linear layers, by name.
        quantized: Whether the values in ``linear`` went through a quantization.
    """

    shapes: Mapping[str, list[int]]
    exact: Mapping[str, list[float]]
    linear: Mapping[str, list[float]]
    quantized: bool

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Identity:
        """Read what ``dataclasses.asdict`` gave; raise KeyError or TypeError if it is something else."""
        return cls(**{name: content[name] for name in ("shapes", "exact", "linear", "quantized")})


@torch.no_grad()
def take(model: PreTrainedModel) -> Identity | None:
    """What a base model without adapters is recognized by; None if some of its weights are not in memory."""
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        return None
    embeddings = {id(layer.weight) for layer in _embeddings(model)}
    samples = {
        name: _sample(parameter)
        for name, parameter in parameters.items()
        if parameter.is_floating_point() and (parameter.ndim == 1 or id(parameter) in embeddings)
    }
    layers = _sampled_layers(model)
    linear = {f"{path}.weight": _sample(_values(layer)) for path, layer in layers}
    return Identity(
        shapes={name: shape_of(parameter) for name, parameter in parameters.items()},
        exact=_fetched(samples),
        linear=_fetched(linear),
        quantized=any(type(layer.weight).__name__ in _DEQUANTIZE for _, layer in layers),
    )


def difference(recorded: Identity, found: Identity) -> str | None:
    """How the model ``found`` differs from the ``recorded`` one, as a clause; None if they are the same model."""
    only = sorted(set(recorded.shapes) ^ set(found.shapes))
    if only:
        which = "lacks" if only[0] in recorded.shapes else "also has"
        return f"it {which} {only[0]}"
    for name, shape in recorded.shapes.items():
        if list(shape) != list(found.shapes[name]):
            return f"{name} has shape {found.shapes[name]} instead of {shape}"
    for name, values in recorded.exact.items():
        if not _close(values, found.exact.get(name, [])):
            return f"the values of {name} are others"
    for name, values in recorded.linear.items():
        other = found.linear.get(name, [])
        coarse = recorded.quantized or found.quantized
        if not (_alike(values, other) if coarse else _close(values, other)):
            return f"the values of {name} are others"
    return None


def shape_of(parameter: torch.nn.Parameter) -> list[int]:
    """The parameter's shape, as if it were not quantized."""
    return list(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def _embeddings(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
            yield layer


def _sampled_layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The first and the last of the smallest linear layers inside the model's blocks."""
    head = model.get_output_embeddings()
    linear = [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "in_features") and module is not head
    ]
    if not linear:
        return []
    smallest = min(module.in_features * module.out_features for _, module in linear)
    chosen = [(path, module) for path, module in linear if module.in_features * module.out_features == smallest]
    return [chosen[0], chosen[-1]] if len(chosen) > 1 else chosen


def _values(layer: torch.nn.Module) -> torch.Tensor:
    dequantize = _DEQUANTIZE.get(type(layer.weight).__name__)
    return dequantize(layer) if dequantize else layer.weight


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced values: 4 of a vector, 32 rows by 4 columns of a matrix; float32, flat, on the tensor's device."""
    if tensor.ndim == 1:
        return tensor[_spaced(tensor.shape[0], _VALUES_1D)].float()
    rows = tensor[_spaced(tensor.shape[0], _ROWS)]
    return rows[:, _spaced(tensor.shape[1], _COLUMNS)].float().flatten()


def _spaced(length: int, count: int) -> list[int]:
    return [i * length // count for i in range(count)] if length > count else list(range(length))


def _fetched(samples: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Move all samples to the host, those of one device together."""
    by_device: dict[torch.device, list[str]] = {}
    for name, sample in samples.items():
        by_device.setdefault(sample.device, []).append(name)
    fetched: dict[str, list[float]] = {}
    for names in by_device.values():
        values = torch.cat([samples[name] for name in names]).tolist()
        for name in names:
            count = samples[name].numel()
            fetched[name] = [float(f"{value:.6g}") for value in values[:count]]
            del values[:count]
    return {name: fetched[name] for name in samples}


def _close(first: list[float], second: list[float]) -> bool:
    if len(first) != len(second):
        return False
    a, b = torch.tensor(first), torch.tensor(second)
    return torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE * float(a.abs().max())) if len(first) else True


def _alike(first: list[float], second: list[float]) -> bool:
    if len(first) != len(second):
        return False
    return float(torch.cosine_similarity(torch.tensor(first), torch.tensor(second), dim=0)) >= _ALIKE
