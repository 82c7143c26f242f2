"""The quantization methods: their names, and which type each tensor of a file gets.

A method is a file type of llama.cpp: a type for most tensors, and others for those that matter more, by their role,
by the place of their layer, and by whether there is an importance matrix. The choices are llama.cpp's, read off its
quantizer (MIT, build b10605), so that a file of ours equals one of its own bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from unsloth.core.errors import ConfigError

Role = Literal["embedding", "output", "q", "k", "v", "o", "gate", "up", "down", "other"]
Where = Literal["all", "first eighth", "first sixteenth", "first two", "first four", "more bits", "middle"]
When = Literal["always", "grouped", "imatrix", "no imatrix", "no imatrix, not grouped"]


@dataclass(frozen=True)
class Choice:
    """Another type than the method's for the tensors of one role.

    Attributes:
        role: Of the tensor.
        type: That it gets.
        where: In which layers.
        when: Under which condition: keys and values are grouped (at least four queries to each), or there is an
            importance matrix.
    """

    role: Role
    type: Type
    where: Where = "all"
    when: When = "always"


@dataclass(frozen=True)
class Method:
    """A file type.

    Attributes:
        name: In llama.cpp's spelling, in lower case.
        file_type: Its number, which stands in the file.
        type: Of most tensors.
        choices: Of other types; the first that fits is taken.
        output: Of the output head, or of the token embedding where there is no head.
        embedding: Of the token embedding beside a head; None: as most tensors.
        measured: Whether the types are only a budget, within which others are chosen by measurement.
    """

    name: str
    file_type: LlamaFileType
    type: Type
    choices: tuple[Choice, ...] = ()
    output: Type = Type.Q6_K
    embedding: Type | None = None
    measured: bool = False


def _low(middle: Type, small: Type, output: Type | None) -> tuple[Choice, ...]:
    """The choices that the methods of one and two bits share."""
    choices = [
        Choice("v", Type.Q4_K, when="grouped"),
        Choice("v", middle),
        Choice("down", small, "first eighth"),
    ]
    return (*choices, Choice("o", output)) if output is not None else tuple(choices)


_GROUPED_V = Choice("v", Type.Q4_K, when="grouped")
_MORE_BITS = (Choice("v", Type.Q6_K, "more bits"), Choice("down", Type.Q6_K, "more bits"))
_FOUR_BIT_I = (
    Choice("v", Type.Q5_K, when="grouped"),
    Choice("down", Type.Q5_K, "first eighth", "no imatrix"),
)
_FT = LlamaFileType

METHODS: tuple[Method, ...] = (
    Method("f32", _FT.ALL_F32, Type.F32),
    Method("f16", _FT.MOSTLY_F16, Type.F16),
    Method("bf16", _FT.MOSTLY_BF16, Type.BF16),
    Method("q8_0", _FT.MOSTLY_Q8_0, Type.Q8_0, output=Type.Q8_0),
    Method("q6_k", _FT.MOSTLY_Q6_K, Type.Q6_K),
    Method("q5_k_m", _FT.MOSTLY_Q5_K_M, Type.Q5_K, _MORE_BITS),
    Method("q5_k_s", _FT.MOSTLY_Q5_K_S, Type.Q5_K),
    Method("q5_1", _FT.MOSTLY_Q5_1, Type.Q5_1),
    Method("q5_0", _FT.MOSTLY_Q5_0, Type.Q5_0, (Choice("down", Type.Q5_1, "first eighth", "imatrix"),)),
    Method("q4_k_m", _FT.MOSTLY_Q4_K_M, Type.Q4_K, _MORE_BITS),
    Method(
        "q4_k_s",
        _FT.MOSTLY_Q4_K_S,
        Type.Q4_K,
        (Choice("v", Type.Q5_K, "first four"), Choice("down", Type.Q5_K, "first eighth")),
    ),
    Method("q4_1", _FT.MOSTLY_Q4_1, Type.Q4_1),
    Method("q4_0", _FT.MOSTLY_Q4_0, Type.Q4_0, (Choice("down", Type.Q4_1, "first eighth", "imatrix"),)),
    Method("iq4_nl", _FT.MOSTLY_IQ4_NL, Type.IQ4_NL, _FOUR_BIT_I),
    Method("iq4_xs", _FT.MOSTLY_IQ4_XS, Type.IQ4_XS, _FOUR_BIT_I),
    Method(
        "q3_k_l",
        _FT.MOSTLY_Q3_K_L,
        Type.Q3_K,
        (Choice("v", Type.Q5_K), Choice("down", Type.Q5_K), Choice("o", Type.Q5_K)),
    ),
    Method(
        "q3_k_m",
        _FT.MOSTLY_Q3_K_M,
        Type.Q3_K,
        (
            Choice("v", Type.Q5_K, "first two"),
            Choice("v", Type.Q4_K),
            Choice("down", Type.Q5_K, "first sixteenth"),
            Choice("down", Type.Q4_K),
            Choice("o", Type.Q4_K),
        ),
    ),
    Method("q3_k_s", _FT.MOSTLY_Q3_K_S, Type.Q3_K),
    Method(
        "iq3_m",
        _FT.MOSTLY_IQ3_M,
        Type.IQ3_S,
        (Choice("v", Type.Q4_K), Choice("down", Type.Q4_K, "first eighth"), Choice("o", Type.Q4_K)),
    ),
    Method("iq3_s", _FT.MOSTLY_IQ3_S, Type.IQ3_S, (_GROUPED_V,)),
    Method(
        "iq3_xs",
        _FT.MOSTLY_IQ3_XS,
        Type.IQ3_S,
        (
            _GROUPED_V,
            Choice("k", Type.IQ3_XXS),
            Choice("q", Type.IQ3_XXS),
            Choice("gate", Type.IQ3_XXS, "middle"),
            Choice("up", Type.IQ3_XXS, "middle"),
        ),
    ),
    Method(
        "iq3_xxs",
        _FT.MOSTLY_IQ3_XXS,
        Type.IQ3_XXS,
        (
            _GROUPED_V,
            Choice("v", Type.IQ3_S, when="no imatrix, not grouped"),
            Choice("k", Type.IQ2_S),
            Choice("q", Type.IQ2_S),
            Choice("down", Type.Q4_K, "first eighth", "no imatrix"),
            Choice("down", Type.Q3_K, when="no imatrix"),
            Choice("o", Type.IQ3_S),
        ),
        output=Type.Q5_K,
        embedding=Type.IQ3_S,
    ),
    Method(
        "q2_k",
        _FT.MOSTLY_Q2_K,
        Type.Q2_K,
        (_GROUPED_V, Choice("v", Type.Q3_K), Choice("down", Type.Q3_K), Choice("o", Type.Q3_K)),
    ),
    Method(
        "q2_k_s",
        _FT.MOSTLY_Q2_K_S,
        Type.Q2_K,
        (_GROUPED_V, Choice("down", Type.Q4_K, "first eighth")),
    ),
    Method(
        "iq2_m",
        _FT.MOSTLY_IQ2_M,
        Type.IQ2_S,
        _low(Type.IQ3_S, Type.IQ3_S, Type.IQ3_S),
        Type.Q5_K,
        Type.IQ3_S,
    ),
    Method(
        "iq2_s",
        _FT.MOSTLY_IQ2_S,
        Type.IQ2_XS,
        _low(Type.IQ3_S, Type.IQ3_S, Type.IQ3_S),
        Type.Q5_K,
        Type.IQ3_S,
    ),
    Method("iq2_xs", _FT.MOSTLY_IQ2_XS, Type.IQ2_XS, _low(Type.Q2_K, Type.Q2_K, None), Type.Q5_K, Type.Q2_K),
    Method(
        "iq2_xxs",
        _FT.MOSTLY_IQ2_XXS,
        Type.IQ2_XXS,
        _low(Type.Q2_K, Type.Q2_K, None),
        Type.Q5_K,
        Type.Q2_K,
    ),
    Method(
        "iq1_m",
        _FT.MOSTLY_IQ1_M,
        Type.IQ1_M,
        _low(Type.Q2_K, Type.Q2_K, Type.IQ2_XXS),
        Type.Q5_K,
        Type.Q2_K,
    ),
    Method(
        "iq1_s",
        _FT.MOSTLY_IQ1_S,
        Type.IQ1_S,
        _low(Type.Q2_K, Type.Q2_K, Type.IQ2_XXS),
        Type.Q5_K,
        Type.Q2_K,
    ),
    Method("tq2_0", _FT.MOSTLY_TQ2_0, Type.TQ2_0, embedding=Type.Q4_K),
    Method("tq1_0", _FT.MOSTLY_TQ1_0, Type.TQ1_0, embedding=Type.Q4_K),
)

# llama.cpp took q3_k_xs out in 2024; iq3_xs is what it says instead.
ALIASES = {
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k": "q3_k_m",
    "q3_k_xs": "iq3_xs",
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp32": "f32",
    "float32": "f32",
}

_BY_NAME = {method.name: method for method in METHODS}

# What takes the place of a type whose blocks do not divide a tensor's rows.
_FALLBACKS = {
    Type.IQ1_S: Type.IQ4_NL,
    Type.IQ1_M: Type.IQ4_NL,
    Type.IQ2_XXS: Type.IQ4_NL,
    Type.IQ2_XS: Type.IQ4_NL,
    Type.IQ2_S: Type.IQ4_NL,
    Type.IQ3_XXS: Type.IQ4_NL,
    Type.IQ3_S: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.TQ1_0: Type.Q4_0,
    Type.TQ2_0: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
TERNARY = (Type.TQ1_0, Type.TQ2_0)
PLAIN = (Type.F32, Type.F16, Type.BF16)
NEED_IMATRIX = (Type.IQ3_XXS, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M, Type.IQ1_S)
"""Types that are useless without an importance matrix."""
WITHOUT_IMATRIX = ("output.weight", "token_embd.weight")
"""Tensors that an importance matrix has nothing for."""
WANT_IMATRIX = (*NEED_IMATRIX, Type.IQ3_S)
"""Those, and the one that loses most where there is none (docs/gguf.md has the figures)."""


def find(name: str, first_conversion: str) -> Method:
    """The method of a name, in any spelling that the documentation uses.

    Args:
        name: For instance ``"q4_k_m"``, ``"Q4_K"`` or ``"quantized"``.
        first_conversion: What ``"not_quantized"`` stands for.

    Raises:
        ConfigError: There is no such method.
    """
    if not isinstance(name, str):
        raise ConfigError("a quantization_method is a name", got=name, do='For instance "q4_k_m".')
    plain = name.lower().replace("-", "_").removeprefix("ud_")
    plain = first_conversion if plain == "not_quantized" else ALIASES.get(plain, plain)
    if plain not in _BY_NAME:
        raise ConfigError(
            "unknown quantization_method",
            got=name,
            do=f"There are: not_quantized, fast_quantized, quantized, {', '.join(_BY_NAME)}.",
        )
    return _BY_NAME[plain]


@dataclass(frozen=True)
class Shape:
    """What the choice of types depends on, beside the tensors.

    Attributes:
        layers: Number of blocks.
        grouping: Queries to each key.
        large: Whether it is the 70B model of its family, whose values are few.
        imatrix: Whether there is an importance matrix.
    """

    layers: int
    grouping: int
    large: bool = False
    imatrix: bool = False


def types(method: Method, tensors: Mapping[str, Sequence[int]], shape: Shape) -> dict[str, Type]:
    """The type that llama.cpp would give each tensor, before any fallback for its width.

    Args:
        method: The file type.
        tensors: Shape of each tensor (rows last but one, as in torch) by its name in the file.
        shape: Of the model.

    Returns:
        Types by name; tensors that are never quantized (norms, biases, factors) are left out.
    """
    chosen: dict[str, Type] = {}
    place: dict[Role, int] = {}
    count = sum(1 for name in tensors if role(name) == "v")
    tied = "output.weight" not in tensors
    for name in sorted((n for n in tensors if is_quantized(n, tensors[n])), key=_order):
        if method.type in PLAIN:
            chosen[name] = method.type
            continue
        part = role(name)
        number = place[part] = place.get(part, -1) + 1
        if part == "output" or (part == "embedding" and tied):
            chosen[name] = _output(method, tensors[name][-1])
        elif part == "embedding":
            chosen[name] = method.embedding or method.type
        else:
            chosen[name] = _chosen(method, part, number, count if part == "v" else shape.layers, shape)
    return chosen


def _order(name: str) -> tuple[int, str]:
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1, name)


def role(name: str) -> Role:
    """What a tensor is for, by its name in the file."""
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "embedding"
    parts: dict[str, Role] = {
        "attn_qkv.weight": "v",
        "attn_v.weight": "v",
        "attn_k.weight": "k",
        "attn_q.weight": "q",
        "attn_output.weight": "o",
        "ffn_up": "up",
        "ffn_gate": "gate",
        "ffn_down": "down",
    }
    return next((part for piece, part in parts.items() if piece in name), "other")


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is ever quantized: matrices other than norms and the choice of experts are."""
    return len(shape) > 1 and name.endswith(".weight") and "_norm." not in name and "ffn_gate_inp" not in name


def _output(method: Method, width: int) -> Type:
    return Type.Q8_0 if width % block(method.type) else method.output


def _chosen(method: Method, part: Role, number: int, count: int, shape: Shape) -> Type:
    fitting = (c for c in method.choices if c.role == part and _holds(c, number, count, shape))
    choice = next(fitting, None)
    found = method.type if choice is None else choice.type
    low = method.output is Type.Q5_K and method.name != "iq3_xxs"  # one and two bits have no rule for the 70B
    if shape.large and part == "v" and not low and found in (Type.Q3_K, Type.Q4_K):
        return Type.Q5_K
    return found


def _holds(choice: Choice, number: int, count: int, shape: Shape) -> bool:
    grouped = shape.grouping >= 4
    conditions: dict[When, bool] = {
        "always": True,
        "grouped": grouped,
        "imatrix": shape.imatrix,
        "no imatrix": not shape.imatrix,
        "no imatrix, not grouped": not shape.imatrix and not grouped,
    }
    eighth = count // 8
    places: dict[Where, bool] = {
        "all": True,
        "first eighth": number < eighth,
        "first sixteenth": number < count // 16,
        "first two": number < 2,
        "first four": number < 4,
        "more bits": number < eighth or number >= 7 * count // 8 or (number - eighth) % 3 == 2,
        "middle": eighth <= number < 7 * count // 8,
    }
    return conditions[choice.when] and places[choice.where]


def block(kind: Type) -> int:
    """Elements of a row that a type stores together."""
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[kind][0]


def fitted(kind: Type, width: int) -> Type:
    """The type itself if its blocks divide rows of ``width``, else what llama.cpp takes in its place."""
    if width % block(kind) == 0:
        return kind
    other = _FALLBACKS.get(kind, Type.F16)
    return other if width % block(other) == 0 else Type.F16


def needs_imatrix(method: Method, name: str, kind: Type) -> bool:
    """Whether a tensor of this type comes out useless without an importance matrix."""
    if name in WITHOUT_IMATRIX:
        return False
    return kind in NEED_IMATRIX or (kind is Type.Q2_K and method.name == "q2_k_s")
