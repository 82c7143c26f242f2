"""Whether a call of a decoder block can be computed as one function, and with what.

Looks at the call's arguments and at the modules as they are now; changes nothing. What it finds is what
:mod:`unsloth.layers.whole_block` computes; a reason instead means that the block's parts are called one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unsloth.kernels.causal_attention import Visible, choose_backend
from unsloth.kernels.lora_linear import product_dtype
from unsloth.kernels.rope import RopeTables
from unsloth.layers import attention, mlp
from unsloth.layers.block_mlp import MlpParts
from unsloth.layers.block_passes import Parts
from unsloth.layers.block_sizes import LEAN_TILE, TILE, block_sizes, head_groups
from unsloth.layers.fast import is_swapped, is_untouched
from unsloth.layers.linear import Frozen, read_all
from unsloth.layers.norm import NormOptions
from unsloth.layers.packed_attention import NAME, documents_of
from unsloth.layers.site import Site
from unsloth.memory import checkpointing
from unsloth.memory.budget import Place
from unsloth.memory.keeper import Decision

_UNREAD = {
    "position_embeddings", "position_ids", "use_cache", "cache_position", "num_items_in_batch", "return_dict",
    "output_hidden_states", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


def read_block(block: torch.nn.Module, x: torch.Tensor, kwargs: Mapping[str, Any]) -> Parts | str:
    """The parts of a call of ``block`` with input ``x`` (B, T, K), or why it must be made of separate functions."""
    options = block.unsloth_fast.options  # type: ignore[union-attr]
    attend, feed = getattr(block, options.attention), getattr(block, options.mlp)
    reason = _call(x, kwargs) or options.peculiarity() or _modules(attend, feed)
    if reason is not None:
        return reason
    of_attention: attention.AttentionOptions = attend.unsloth_fast.options
    of_mlp: mlp.MlpOptions = feed.unsloth_fast.options
    reason = _scores(attend, of_attention, kwargs)
    if reason is not None:
        return reason
    names = [(attend, name) for name in (*of_attention.projections, of_attention.output)]
    names += [(feed, name) for name in (*of_mlp.gate_up, of_mlp.down)]
    linears = read_all([getattr(module, name) for module, name in names], x, trained=True)
    if isinstance(linears, str):
        return linears
    trained = any(linear.trained for linear in linears)
    if trained and any(linear.adapter is not None or linear.base.weight.dtype != x.dtype for linear in linears):
        return "weights that are trained beside adapters, or in another dtype than the residual stream"
    mixed = trained and options.keeper.mixes and _is_mixed(x) and of_attention.head_norms is None
    if product_dtype(x) != x.dtype and not mixed:
        return "an input in another dtype than the products"
    if len(of_mlp.gate_up) != 2 or any(linear.bias is not None for linear in linears[-3:]):
        return "an MLP with biases, or gate and up in one"
    norms = _norms([(block, options.input_norm), (block, options.mlp_input_norm)], options.norm, x, trained)
    names = [(attend, name) for name in of_attention.head_norms or ()]
    head_norms = _norms(names, of_attention.head_norm, x, trained)
    if norms is None or head_norms is None:
        return "a norm that is trained, or of another kind or dtype"
    for module in (attend, feed, getattr(block, options.input_norm), getattr(attend, of_attention.output)):
        if is_swapped(module):
            module.unsloth_fast.took()
    return _parts(block, x, kwargs, attend, of_attention, of_mlp, linears, norms, head_norms)


def _call(x: torch.Tensor, kwargs: Mapping[str, Any]) -> str | None:
    """What speaks against it in the call itself."""
    if x.dim() != 3 or not x.is_contiguous() or not x.numel():
        return "an input in another form"
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    if "attention_mask" in given:
        return "an attention mask"
    if given - _UNREAD:
        return f"the argument {min(given - _UNREAD)}"
    return None


def _is_mixed(x: torch.Tensor) -> bool:
    """Whether weights and residual stream are float32, and products bfloat16, whose range is as large."""
    return x.dtype == torch.float32 and product_dtype(x) == torch.bfloat16


def _modules(attend: torch.nn.Module, feed: torch.nn.Module) -> str | None:
    for module in (attend, feed):
        if not is_swapped(module) or not is_untouched(module):
            return "attention or an MLP that is not swapped, or has hooks"
    return None


def _scores(attend: Any, options: attention.AttentionOptions, kwargs: Mapping[str, Any]) -> str | None:
    if attend.config._attn_implementation not in (NAME, "sdpa"):
        return f"attention by {attend.config._attn_implementation}"
    if options.softcap is not None or (attend.training and attend.attention_dropout):
        return "a soft cap, or dropout in attention"
    rotates = options.rotary_switch is None or bool(getattr(attend, options.rotary_switch))
    if rotates and kwargs.get("position_embeddings") is None:
        return "no tables of the rotary embedding"
    if options.head_norms is not None and (not rotates or options.head_norm is None):
        return "norms of heads without rotary embedding"
    return None


def _norms(
    found: list[tuple[torch.nn.Module, Any]], options: NormOptions | None, x: torch.Tensor, trained: bool
) -> list[tuple[torch.Tensor, NormOptions]] | None:
    """Weights and options of the norms named; None if one must be called itself."""
    norms = []
    for owner, name in found:
        module = getattr(owner, name)
        weight = module.weight
        fits = weight.dtype == x.dtype and (trained or not weight.requires_grad)
        if options is None or not is_untouched(module) or not fits:
            return None
        norms.append((weight, options))
    return norms


def _parts(
    block: Any,
    x: torch.Tensor,
    kwargs: Mapping[str, Any],
    attend: Any,
    options: attention.AttentionOptions,
    of_mlp: mlp.MlpOptions,
    linears: list[Frozen],
    norms: list[tuple[torch.Tensor, NormOptions]],
    head_norms: list[tuple[torch.Tensor, NormOptions]],
) -> Parts | str:
    visible = _visible(x, kwargs.get("position_ids"), attend, options.window)
    backend = choose_backend(x.device, product_dtype(x), options.head_dim, visible)
    if backend is None:
        return "no attention kernel that hands out its log-sum-exp"
    heads = (options.heads, options.key_heads, options.head_dim)
    keeper, number = block.unsloth_fast.options.keeper, block.unsloth_fast.options.number
    decision = _decide(block, x, heads, linears, (*x.shape, visible.room()))
    held = keeper.held(number) if decision.holds_weights else None
    tile = LEAN_TILE if decision.lean else TILE
    return Parts(
        norm=norms[0],
        qkv=Site("qkv", tuple(linears[:-4]), held),
        output=Site("output", (linears[-4],), held),
        mlp=MlpParts(
            *norms[1],
            gate_up=Site("gate_up", (linears[-3], linears[-2]), held),
            down=Site("down", (linears[-1],), held),
            activation=of_mlp.activation,
            tile=tile,
            dtype=product_dtype(x),
        ),
        heads=heads,
        head_norms=(head_norms[0][0], head_norms[1][0]) if head_norms else None,
        head_norm=options.head_norm,
        tables=_tables(x, options, attend, kwargs.get("position_embeddings")),
        visible=visible,
        scale=options.scale,
        backend=backend,
        head_groups=head_groups(x.shape[0] * x.shape[1], options.key_heads) if decision.lean else 1,
        decision=decision,
        keeper=keeper,
        number=number,
        trained=any(linear.trained for linear in linears),
    )


def _decide(
    block: Any, x: torch.Tensor, heads: tuple[int, int, int], linears: list[Frozen], batch: tuple[Any, ...]
) -> Decision:
    """What becomes of this block's values."""
    options = block.unsloth_fast.options
    if not torch.is_grad_enabled():  # nothing stays; what training passes hold is there to be read
        chosen = options.keeper.assignment
        return Decision(Place.RECOMPUTE, chosen.lean, options.number < chosen.holding)
    policy = checkpointing.policy_of(block)
    if policy is False:
        return Decision(Place.KEEP, lean=False)
    sizes = block_sizes(x.shape[0] * x.shape[1], x.shape[2], heads, linears, x.element_size())
    trained = sum(a.a.nbytes + a.b.nbytes for linear in linears if (a := linear.adapter) is not None)
    trained += sum(linear.base.weight.nbytes for linear in linears if linear.trained)
    later = 3 * options.keeper.layers * trained  # gradients, and two moments in as many bytes at most
    return options.keeper.decide(options.number, policy, sizes, later, x.device, batch)


def _visible(x: torch.Tensor, positions: torch.Tensor | None, attend: Any, window: int | None) -> Visible:
    batch, tokens, _ = x.shape
    if positions is None or attend.config._attn_implementation != NAME:
        bounds = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=x.device)
        return Visible(bounds, tokens, True, _window(window, tokens))
    found = documents_of(positions, batch)
    most = found.longest if found.branches is None else found.branches.keys.longest
    return Visible(found.cu_seqlens, found.longest, found.single, _window(window, most), found.branches)


def _window(window: int | None, longest: int) -> int:
    return window if window is not None and window < longest else 0


def _tables(
    x: torch.Tensor, options: attention.AttentionOptions, attend: Any, given: tuple[torch.Tensor, torch.Tensor] | None
) -> RopeTables | None:
    if given is None or (options.rotary_switch is not None and not getattr(attend, options.rotary_switch)):
        return None
    found = attention.rotation(options, given)
    cos, sin = (table.expand(*x.shape[:2], table.shape[-1]) for table in (found["cos"], found["sin"]))
    return RopeTables(cos, sin, None, found["rotary_dim"], found["interleaved"])
