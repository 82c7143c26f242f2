"""Dynamic quantization: every tensor gets the type that its measured sensitivity deserves, within a plain type's size.

``dynamic_q4_k_xl`` is a file no larger than ``q4_k_m``, whose bytes are spent where they save most divergence from
the unquantized model. Which types those are is found anew for each model and text.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from gguf import GGMLQuantizationType as Type

from unsloth.core.errors import ConfigError, ExportError
from unsloth.export import sensitivity
from unsloth.export.gguf import methods, quantize
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Planned, Reader
from unsloth.export.gguf.methods import Method
from unsloth.export.sensitivity import Terms

PREFIX = "ud-"
"""What the names of these methods begin with, as in the documentation's file names."""

_XL = {
    "q2_k_xl": "q2_k",
    "q3_k_xl": "q3_k_m",
    "q4_k_xl": "q4_k_m",
    "q5_k_xl": "q5_k_m",
    "q6_k_xl": "q6_k",
    "q8_k_xl": "q8_0",
}

# The types to choose from, for budgets up to so many bits a weight. I-quants below 4 bits are slow on a CPU, and
# offered where there is no other way to be small.
_CHOICES: tuple[tuple[float, tuple[Type, ...]], ...] = (
    (2.7, (Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS)),
    (3.6, (Type.IQ2_S, Type.Q2_K, Type.IQ3_XXS, Type.IQ3_S)),
    (5.0, (Type.Q3_K,)),
    (6.2, (Type.IQ4_XS, Type.IQ4_NL, Type.Q4_0, Type.Q4_K, Type.Q4_1)),
    (99.0, (Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16)),
)


@dataclass(frozen=True)
class Option:
    """One way to store a tensor.

    Attributes:
        type: The type.
        size: Bytes.
        divergence: What it costs, in nats per token.
    """

    type: Type
    size: int
    divergence: float


@dataclass(frozen=True)
class Chosen:
    """The types of a file.

    Attributes:
        types: Of every tensor that is quantized, by name.
        size: Bytes of all of them.
        budget: Bytes that the plain type takes.
        divergence: Predicted, in nats per token.
        plain_divergence: That of the plain type's own choice of types, with the same importance matrix.
    """

    types: dict[str, Type]
    size: int
    budget: int
    divergence: float
    plain_divergence: float


def find(name: str) -> Method | None:
    """The method of a dynamic type's name: ``"dynamic_q4_k_xl"``, ``"UD-Q4_K_XL"``, ``"Q2_K_XL"``, ``"UD-IQ1_M"``.

    ``dynamic_X`` and ``UD-X`` exist for every quantized method X, and take no more than its size.

    Returns:
        The method whose size is the budget, marked as measured; None for a name that is not dynamic.

    Raises:
        ConfigError: A dynamic type of a method that does not exist or quantizes nothing.
    """
    if not isinstance(name, str):
        return None
    plain = name.lower().replace("-", "_")
    bare = plain.removeprefix("dynamic_").removeprefix("ud_")
    if bare == plain and bare not in _XL:
        return None
    budget = _XL.get(bare, bare)
    known = {method.name for method in methods.METHODS if method.type not in methods.PLAIN}
    if budget not in known and budget not in methods.ALIASES:
        raise ConfigError("no such dynamic type", got=name, do=f"There are: {', '.join(_XL)}, and UD- with any other.")
    method = methods.find(budget, "bf16")
    if method.type in methods.PLAIN:
        raise ConfigError("a dynamic type needs the size of a quantized one", got=name, do='Try "dynamic_q4_k_xl".')
    return replace(method, name=PREFIX + (bare if bare in _XL else method.name), measured=True)


def choose(
    method: Method, conversion: Conversion, source: Reader, terms: Terms, importance: quantize.Imatrix
) -> Chosen:
    """Find the types of a file.

    Args:
        method: From :func:`find`.
        conversion: Of the model.
        source: The unquantized file.
        terms: Sensitivity of each tensor.
        importance: Mean squared inputs, with which tensors are quantized.

    Raises:
        ExportError: The sensitivity of a tensor is missing.
    """
    plain = budget_of(method, conversion)
    tensors = {tensor.name: tensor for tensor in source}
    missing = sorted(plain.keys() - terms.keys())
    if missing:
        raise ExportError("the sensitivity of a tensor was not measured", got=missing[0], do="Choose a plain type.")
    budget = sum(tensor.size for tensor in plain.values())
    weights = sum(tensors[name].size // _element_size(tensors[name].type) for name in plain)
    kinds = _kinds(8 * budget / weights)

    def options(name: str) -> list[Option]:
        own, shape = plain[name].type, plain[name].shape
        fitting = [kind for kind in {*kinds, own} if _is_possible(kind, name, shape)]
        values = importance.get(name)
        found = sensitivity.divergences(source, tensors[name], terms[name], fitting, values)
        return [Option(kind, Planned(name, shape, kind).size, cost) for kind, cost in found.items()]

    for kind in {*kinds, *(tensor.type for tensor in plain.values())} - set(methods.PLAIN):
        quantize.build_tables(kind)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        table = dict(zip(plain, pool.map(options, plain), strict=True))
    types = allocate(table, budget)
    costs = {name: {option.type: option for option in each} for name, each in table.items()}
    size = sum(costs[name][kind].size for name, kind in types.items())
    return Chosen(
        types=types,
        size=size,
        budget=budget,
        divergence=sum(costs[name][kind].divergence for name, kind in types.items()),
        plain_divergence=sum(costs[name][tensor.type].divergence for name, tensor in plain.items()),
    )


def _element_size(kind: int) -> int:
    return 4 if kind == Type.F32 else 2


def _kinds(bits: float) -> list[Type]:
    return [kind for limit, kinds in _CHOICES if bits <= limit for kind in kinds]


def _is_possible(kind: Type, name: str, shape: Sequence[int]) -> bool:
    """Whether its blocks divide the rows, and it is of use without an importance matrix where there is none."""
    without = name in methods.WITHOUT_IMATRIX
    return shape[-1] % methods.block(kind) == 0 and not (without and kind in methods.NEED_IMATRIX)


def budget_of(method: Method, conversion: Conversion) -> dict[str, Planned]:
    """The tensors that are quantized, as the plain type stores them.

    With or without an importance matrix, whichever is smaller.
    """
    sizes = {tensor.name: tensor.shape for tensor in conversion.planned}
    ways = []
    for given in (False, True):
        wanted = methods.types(method, sizes, replace(conversion.shape, imatrix=given))
        fitting = {name: methods.fitted(kind, sizes[name][-1]) for name, kind in wanted.items()}
        ways.append({name: Planned(name, sizes[name], kind) for name, kind in fitting.items()})
    return min(ways, key=lambda way: sum(tensor.size for tensor in way.values()))


def allocate(table: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Type]:
    """Choose an option for each tensor: least divergence in all, within ``budget`` bytes.

    Every tensor starts with its smallest option; then the step that saves most divergence per byte is taken, again
    and again, among the options that lie on the lower convex hull of divergence over size, until no step fits.

    Raises:
        ExportError: The smallest options are larger than the budget.
    """
    hulls = {name: _hull(options) for name, options in table.items()}
    place = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].size for hull in hulls.values())
    if left < 0:
        raise ExportError("no choice of types is as small as asked", got=f"{budget:,} bytes")
    steps = [_step(name, hull, 0) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, number = heapq.heappop(steps)
        hull = hulls[name]
        more = hull[number + 1].size - hull[number].size
        if more > left:
            continue
        left -= more
        place[name] = number + 1
        if number + 2 < len(hull):
            heapq.heappush(steps, _step(name, hull, number + 1))
    return {name: hull[place[name]].type for name, hull in hulls.items()}


def _step(name: str, hull: Sequence[Option], number: int) -> tuple[float, str, int]:
    now, then = hull[number], hull[number + 1]
    return (then.divergence - now.divergence) / (then.size - now.size), name, number


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, by rising size and falling divergence."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.divergence)):
        if hull and option.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    return (second.divergence - first.divergence) / (second.size - first.size)
