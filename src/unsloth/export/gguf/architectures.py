"""What llama.cpp's architectures compute, as data beside our family specs.

A family's spec says what its model computes; an :class:`Architecture` says what the program that reads the file will
compute, and which numbers it takes from the file. Whatever the two do not have in common is either folded into the
weights (:mod:`unsloth.export.gguf.tensors`) or refused. The facts were read off llama.cpp (MIT), build b10605.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gguf import MODEL_ARCH, MODEL_TENSOR

from unsloth.core.errors import ExportError
from unsloth.models.spec import ModelSpec

_QKV = frozenset({MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V, MODEL_TENSOR.ATTN_QKV})
_ALL = _QKV | {MODEL_TENSOR.ATTN_OUT, MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        arch: Its number in the ``gguf`` package, which has its name.
        pairs: Which dimensions of a head its rotary embedding turns together.
        biases: The tensors that may have a bias; any other bias would be ignored, or refused.
        activations: Of the MLP, in the words of :func:`unsloth.models.spec.activation`.
        window: Whether it reads a sliding window, and which layers have it.
        scores: How attention scores are scaled: by the head's dimension, by a number in the file, or as Gemma does.
        head: Whether there may be an output head apart from the token embedding.
        embedding_scale: Of the token embedding: none, a number in the file, or the root of the hidden size.
        logits: Whether the logits are multiplied or divided by a number in the file.
        residual_scale: Whether what is added to the residual stream is scaled by a number in the file.
        softcaps: Whether attention and logits must be capped, only the logits may be, or neither is.
        rope_factors: Whether it reads a factor for each frequency, or two sets of them, of which the context's length
            chooses one.
        rope_period: Every such layer is without a rotary embedding; 0 for none.
        square: Whether the heads together must be as wide as the model.
        head_norm_from: Least number of layers from which on heads have norms.
    """

    arch: MODEL_ARCH
    pairs: Literal["neighbours", "halves"] = "halves"
    biases: frozenset[MODEL_TENSOR] = _QKV
    activations: tuple[str, ...] = ("silu",)
    window: bool = False
    scores: Literal["head", "file", "gemma"] = "head"
    head: bool = True
    embedding_scale: Literal["none", "file", "root"] = "none"
    logits: Literal["none", "times", "over"] = "none"
    residual_scale: bool = False
    softcaps: Literal["none", "logits", "both"] = "none"
    rope_factors: Literal["none", "one", "two"] = "none"
    rope_period: int = 0
    square: bool = False
    head_norm_from: int = 0


_LLAMA = Architecture(MODEL_ARCH.LLAMA, pairs="neighbours", biases=_ALL, rope_factors="one")
_GELU = ("gelu_tanh", "gelu")  # llama.cpp has the approximation by tanh for both

_BY_FAMILY: dict[str, Architecture] = {
    "cohere": Architecture(
        MODEL_ARCH.COMMAND_R, pairs="neighbours", head=False, logits="times", square=True, head_norm_from=64
    ),
    "cohere2": Architecture(
        MODEL_ARCH.COHERE2, pairs="neighbours", head=False, logits="times", square=True, window=True
    ),
    "cwm": _LLAMA,
    "ernie4_5": Architecture(MODEL_ARCH.ERNIE4_5, pairs="neighbours"),
    "gemma": Architecture(MODEL_ARCH.GEMMA, activations=_GELU, head=False, embedding_scale="root"),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2,
        activations=_GELU,
        head=False,
        embedding_scale="root",
        window=True,
        scores="gemma",
        softcaps="both",
    ),
    "gemma3": Architecture(
        MODEL_ARCH.GEMMA3,
        activations=_GELU,
        embedding_scale="root",
        window=True,
        scores="gemma",
        softcaps="logits",
    ),
    "glm": Architecture(MODEL_ARCH.CHATGLM, pairs="neighbours"),
    "glm4": Architecture(MODEL_ARCH.GLM4, pairs="neighbours"),
    "granite": Architecture(
        MODEL_ARCH.GRANITE,
        pairs="neighbours",
        biases=_ALL,
        scores="file",
        embedding_scale="file",
        logits="over",
        residual_scale=True,
        rope_factors="one",
    ),
    "helium": _LLAMA,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "phi3": Architecture(MODEL_ARCH.PHI3, square=True, rope_factors="two"),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, square=True),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, pairs="neighbours", rope_period=4),
}

NOT_IN_LLAMA_CPP = ("vaultgemma",)
"""Families with a spec that llama.cpp could not run: Gemma 2 without norms after attention and MLP."""


def find(spec: ModelSpec | None, model_type: str) -> Architecture:
    """The architecture in which a family's models are written.

    Raises:
        ExportError: There is none, or the family has no spec.
    """
    if spec is not None and spec.name in _BY_FAMILY:
        return _BY_FAMILY[spec.name]
    lacks = spec is not None and spec.name in NOT_IN_LLAMA_CPP
    raise ExportError(
        "llama.cpp has no such model architecture" if lacks else "this model architecture has no rule for GGUF",
        got=model_type,
        do=f"Save it with save_pretrained_merged. GGUF is written for: {', '.join(sorted(_BY_FAMILY))}.",
    )
