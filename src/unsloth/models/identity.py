"""A base model recognized by its weights: that an adapter is put on its own one, and a run resumed on the same.

The names and shapes of all parameters, and a few values of each that is never quantized: norms, biases, embeddings.
Those are the same whether a model is loaded in 4, 8 or 16 bits. Two of the linear layers are sampled too, and
compared closely if neither side is quantized. All of them go into a checksum, which says something where both sides
hold them alike. So a model that differs in linear layers only, such as one that LoRA was merged into, is told apart
unless one of the two is quantized, or both are, by different machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unsloth.quant import int8, nf4

_DEQUANTIZE = {"Params4bit": nf4.dequantize, "Int8Params": int8.dequantize}
_ADAPTER_PARTS = ("lora_", ".modules_to_save.", "trainable_tokens_")
_WRAPPERS = (".base_layer", ".original_module")
_VALUES_1D, _ROWS, _COLUMNS, _HASHED = 4, 32, 4, 16
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
        quantized: Whether linear layers are quantized, those in ``linear`` among them.
        held: How all other weights than those in ``exact`` are held: dtypes, and devices if quantized.
        checksum: SHA-256 of some elements of each of those, as they are held; empty if one of them is not known.
    """

    shapes: Mapping[str, list[int]]
    exact: Mapping[str, list[float]]
    linear: Mapping[str, list[float]]
    quantized: bool
    held: str
    checksum: str

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Identity:
        """Read what ``dataclasses.asdict`` gave; raise KeyError or TypeError if it is something else."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class _Weight:
    """A parameter of the base model: its name without PEFT's wrappers, and the module that has it."""

    name: str
    module: torch.nn.Module
    parameter: torch.nn.Parameter
    is_exact: bool
    is_linear: bool


@torch.no_grad()
def take(model: torch.nn.Module, *, frozen_only: bool = False) -> Identity:
    """What the base model below any adapter of ``model`` is recognized by.

    The values of weights that are not in memory are left out.

    Args:
        model: A transformers model, with or without adapters.
        frozen_only: Leave out the values of trainable weights, for a model in training.
    """
    weights = list(_base_weights(model))
    known = [w for w in weights if not w.parameter.is_meta and not (frozen_only and w.parameter.requires_grad)]
    others = [w for w in weights if not w.is_exact]
    sampled = _sampled_layers(known)
    return Identity(
        shapes={w.name: shape_of(w.parameter) for w in weights},
        exact=_fetched({w.name: _sample(w.parameter) for w in known if w.is_exact}),
        linear=_fetched({w.name: _sample(_values(w.module)) for w in sampled}),
        quantized=any(map(_is_quantized, others)),
        held=",".join(sorted({_storage(w) for w in others})),
        checksum=_checksum(others) if {w.name for w in others} <= {w.name for w in known} else "",
    )


def difference(recorded: Identity, found: Identity, *, same_machine: bool = False) -> str | None:
    """How the model ``found`` differs from the ``recorded`` one, as a clause; None if they are the same model.

    Args:
        recorded: What a file says.
        found: Of a model in memory; a value that one of the two does not know is not compared.
        same_machine: Whether quantized weights may be compared as they are held. Another device may have rounded a
            few of them otherwise.
    """
    only = sorted(set(recorded.shapes) ^ set(found.shapes))
    if only:
        which = "lacks" if only[0] in recorded.shapes else "also has"
        return f"it {which} {only[0]}"
    for name, shape in recorded.shapes.items():
        if list(shape) != list(found.shapes[name]):
            return f"{name} has shape {found.shapes[name]} instead of {shape}"
    quantized = recorded.quantized or found.quantized
    for compare, before, now in (
        (_close, recorded.exact, found.exact),
        (_alike if quantized else _close, recorded.linear, found.linear),
    ):
        for name in before:
            if name in now and not compare(before[name], now[name]):
                return f"the values of {name} are others"
    alike = recorded.held == found.held and recorded.checksum and found.checksum
    if alike and (same_machine or not quantized) and recorded.checksum != found.checksum:
        return "its linear layers have other weights"
    return None


def shape_of(parameter: torch.nn.Parameter) -> list[int]:
    """The parameter's shape, as if it were not quantized."""
    return list(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def _base_weights(model: torch.nn.Module) -> Iterator[_Weight]:
    """Every parameter of the base once, in the order of its modules."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name, seen = None, set()
    for path, module in model.named_modules():
        if module is head:
            head_name = _base_name(f"{path}.weight")
        for leaf, parameter in module.named_parameters(recurse=False):
            if any(part in f".{path}.{leaf}" for part in _ADAPTER_PARTS) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = _base_name(f"{path}.{leaf}")
            is_embedding = isinstance(module, torch.nn.Embedding) or name == head_name
            yield _Weight(
                name=name,
                module=module,
                parameter=parameter,
                is_exact=parameter.is_floating_point() and (parameter.ndim == 1 or is_embedding),
                is_linear=leaf == "weight" and hasattr(module, "in_features") and name != head_name,
            )


def _base_name(name: str) -> str:
    """``name`` as it is without PEFT."""
    name = f".{name}"
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix(".base_model.model").lstrip(".")


def _sampled_layers(weights: Iterable[_Weight]) -> list[_Weight]:
    """The first and the last of the smallest linear layers inside the model's blocks."""
    sizes = {w.name: w.module.in_features * w.module.out_features for w in weights if w.is_linear}
    chosen = [w for w in weights if w.is_linear and sizes[w.name] == min(sizes.values())]
    return [chosen[0], chosen[-1]] if len(chosen) > 1 else chosen


def _is_quantized(weight: _Weight) -> bool:
    return type(weight.parameter).__name__ in _DEQUANTIZE


def _storage(weight: _Weight) -> str:
    dtype = str(weight.parameter.dtype).removeprefix("torch.")
    return f"{dtype} on {weight.parameter.device.type}" if _is_quantized(weight) else dtype


def _checksum(weights: Iterable[_Weight]) -> str:
    digest = hashlib.sha256()
    for weight in sorted(weights, key=lambda w: w.name):
        flat = weight.parameter.detach().reshape(-1)
        elements = flat[_spaced(flat.numel(), _HASHED)].cpu()
        digest.update(f"{weight.name};".encode() + elements.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
