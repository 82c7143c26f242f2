"""A decoder block: what is added to the residual stream, and in which order.

    pre:       h = x + s A(n1(x))              y = h + s M(n2(h))
    sandwich:  h = x + s n2(A(n1(x)))          y = h + s n4(M(n3(h)))
    parallel:  y = x + A(n1(x)) + M(n1(x))

A attention, M the MLP, n norms, s the family's scale of residuals. The first addition and the norm after it are one
pass over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from unsloth.layers.fast import Fast, is_untouched
from unsloth.layers.linear import FEW_TOKENS
from unsloth.layers.norm import NormOptions, add_and_normalize
from unsloth.layers.read_block import read_block
from unsloth.layers.whole_block import read_only, whole_block
from unsloth.memory import checkpointing
from unsloth.memory.keeper import Keeper


@dataclass(frozen=True)
class BlockOptions:
    """How a block is put together; names are of modules in it.

    Attributes:
        attention: A.
        mlp: M.
        norm: What ``mlp_input_norm`` computes; None where there is none.
        input_norm: Before attention, or None.
        attention_norm: After attention, or None.
        mlp_input_norm: Before the MLP, or None.
        mlp_norm: After the MLP, or None.
        parallel: Whether the MLP sees what attention sees.
        residual_scale: s.
        attention_dropout: Between attention and the residual stream, or None.
        mlp_dropout: Between the MLP and the residual stream, or None.
        keeper: Decides on the memory of blocks that train as one function (:mod:`unsloth.layers.whole_block`), as this
            one does in calls that allow it; None: never.
        number: Of the block, from 0.
    """

    attention: str
    mlp: str
    norm: NormOptions | None = None
    input_norm: str | None = None
    attention_norm: str | None = None
    mlp_input_norm: str | None = None
    mlp_norm: str | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    attention_dropout: str | None = None
    mlp_dropout: str | None = None
    keeper: Keeper | None = None
    number: int = 0

    def peculiarity(self) -> str | None:
        """Why a block like this cannot be one function, or None."""
        plain = self.attention_norm is None and self.mlp_norm is None and not self.parallel
        plain = plain and self.residual_scale == 1.0 and not self.attention_dropout and not self.mlp_dropout
        if not plain or self.norm is None or self.norm.kind != "rms" or self.input_norm is None:
            return "a block of another structure"
        return None


def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a decoder layer: (B, T, K) to (B, T, K)."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, *args, **kwargs)
    fast: Fast = self.unsloth_fast
    if args:
        return fast.decline(self, "positional arguments", hidden_states, *args, **kwargs)
    keeper, number, learns = fast.options.keeper, fast.options.number, torch.is_grad_enabled()
    if keeper is None or not _may_be_whole(hidden_states, kwargs):
        fast.took()
    else:
        parts = read_block(self, hidden_states, kwargs)
        if not isinstance(parts, str):
            fast.took()
            return whole_block(hidden_states, parts) if learns else read_only(hidden_states, parts)
        fast.took(but=f"not as one function: {parts}")
        trained = next((weight for weight in self.parameters() if weight.requires_grad), None)
        if learns and keeper.separate.keeps(number, checkpointing.policy_of(self), hidden_states, trained):
            with keeper.separate.keeping(number, hidden_states):
                return _block(self, hidden_states, **_without_cache(kwargs))
    if keeper is not None and number == 0 and not learns:
        keeper.make_way(hidden_states.device)
    if _must_checkpoint(self):
        return self._gradient_checkpointing_func(partial(_block, self, **_without_cache(kwargs)), hidden_states)
    return _block(self, hidden_states, **kwargs)


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block that may be computed twice must not write to a cache; transformers says so to the user."""
    return {name: value for name, value in kwargs.items() if not isinstance(value, Cache)} | {"use_cache": False}


def _may_be_whole(x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """False for steps and prompts of generation, which are not worth a look or write to a cache."""
    if torch.is_grad_enabled():
        return True
    return x.numel() >= FEW_TOKENS * x.shape[-1] and not any(isinstance(value, Cache) for value in kwargs.values())


def _must_checkpoint(self: Any) -> bool:
    """Whether recomputing is asked for, and is the business of ``forward``.

    transformers wrapped ``__call__`` at first, and ``forward`` since 5.2x.
    """
    return self.training and self.gradient_checkpointing and "__call__" not in GradientCheckpointingLayer.__dict__


def _block(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    options: BlockOptions = self.unsloth_fast.options
    x = _call(self, options.input_norm, hidden_states)
    attended, _ = getattr(self, options.attention)(hidden_states=x, **kwargs)
    attended = _onto_residual(self, options, attended, options.attention_norm, options.attention_dropout)
    if options.parallel:
        h = hidden_states + attended
    else:
        x, h = _add_and_normalize(self, options, attended, hidden_states)
    fed = getattr(self, options.mlp)(x)
    return h + _onto_residual(self, options, fed, options.mlp_norm, options.mlp_dropout)


def _call(self: Any, name: str | None, x: torch.Tensor) -> torch.Tensor:
    return x if name is None else getattr(self, name)(x)


def _onto_residual(
    self: Any, options: BlockOptions, x: torch.Tensor, norm: str | None, dropout: str | None
) -> torch.Tensor:
    x = _call(self, dropout, _call(self, norm, x))
    return x if options.residual_scale == 1.0 else x * options.residual_scale


def _add_and_normalize(
    self: Any, options: BlockOptions, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the MLP sees, the residual stream)."""
    if options.mlp_input_norm is None or options.norm is None:
        h = residual + x
        return h, h
    norm = getattr(self, options.mlp_input_norm)
    if not is_untouched(norm):
        h = residual + x
        return norm(h), h
    return add_and_normalize(x, residual, norm.weight, options.norm)
