"""Causal attention with its two passes apart: the forward hands out the log-sum-exp, the backward takes it.

For who keeps output and log-sum-exp from forward to backward himself, so that recomputing a layer need not compute its
scores again (Dao, "FlashAttention-2", 2023, arXiv:2307.08691). Shapes: B batch, T tokens, H query heads, Hk key heads,
D head dimension; documents as in :mod:`unsloth.kernels.varlen_attention`. With s = scale q k^T over visible pairs::

    lse_i = log sum_j exp(s_ij)     p_ij = exp(s_ij - lse_i)     o = p v
    dv = p^T do    dp = do v^T    ds = p (dp - rowsum(do o))    dq = scale ds k    dk = scale ds^T q

Implementations: "cudnn" and "flash" call the operators behind torch's attention; "reference" is the formula with a
mask over all T x T pairs of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.varlen_attention import Branches, Keys

BACKENDS = ("cudnn", "flash", "reference")
_HALF = (torch.float16, torch.bfloat16)
_FEW = 16
_SHORT = 1024
"""Rows of up to these tokens are told from longer ones only: programs for tokens that are not there end at once."""
_FEW_KEYS = 1024


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys a query sees: those of its document up to itself.

    Attributes:
        cu_seqlens: (N + 1,) int32, bounds of the documents in the B T tokens.
        longest: Tokens of the longest.
        single: Whether every row of the batch is one document.
        window: How many of the newest tokens a query sees, itself included; 0 for all.
        branches: Of documents that begin with keys of others, or None.
    """

    cu_seqlens: torch.Tensor
    longest: int
    single: bool
    window: int = 0
    branches: Branches | None = None

    def mask(self, batch: int, tokens: int) -> torch.Tensor:
        """(B, 1, T, T) booleans."""
        if self.branches is not None:
            return self.branches.mask(self.cu_seqlens, batch, self.window)
        flat = torch.arange(batch * tokens, device=self.cu_seqlens.device)
        document = torch.searchsorted(self.cu_seqlens[1:].long().contiguous(), flat, right=True).view(batch, 1, tokens)
        gap = (flat[:tokens, None] - flat[:tokens])[None, None]
        seen = (document[..., :, None] == document[..., None, :]) & (gap >= 0)
        return seen & (gap < self.window) if self.window else seen

    def room(self) -> Room | None:
        """What this takes, rounded up; None where it is known from the shape of the batch."""
        if self.single and self.branches is None:
            return None
        documents = max(_FEW, _power(self.cu_seqlens.numel() - 1))
        longest = max(_SHORT, _power(self.longest))
        if self.branches is None:
            return Room(documents, longest)
        keys = self.branches.gathered.numel()
        step = max(_FEW_KEYS, _power(keys) // 4)  # few sizes, so that batches of varied lengths often have the same
        return Room(documents, longest, -(-keys // step) * step, max(_SHORT, _power(self.branches.keys.longest)))

    def within(self, room: Room) -> Visible:
        """The same in tensors of the size of ``room``, so that others of that room can be written over it."""
        branches = None
        if self.branches is not None:
            bounds = self.branches.keys.cu_seqlens.new_empty(room.documents + 1)
            gathered = self.branches.gathered.new_empty(room.keys)
            branches = Branches(Keys(bounds, room.longest_keys), gathered, padded=True)
        bounds = self.cu_seqlens.new_empty(room.documents + 1)
        made = Visible(bounds, room.longest, self.single, self.window, branches)
        made.become(self)
        return made

    def become(self, other: Visible) -> None:
        """Write ``other``, of the same room, over what :meth:`within` made: documents that are missing are empty."""
        _fill(self.cu_seqlens, other.cu_seqlens, other.cu_seqlens[-1:])
        if self.branches is not None and other.branches is not None:
            bounds, last = other.branches.keys.cu_seqlens, other.branches.keys.cu_seqlens[-1:]
            _fill(self.branches.keys.cu_seqlens, bounds, last)
            # one past the last token: what lies there is read as any token, and its gradient goes nowhere
            _fill(self.branches.gathered, other.branches.gathered, other.cu_seqlens[-1:])


@dataclass(frozen=True, slots=True)
class Room:
    """Sizes within which a :class:`Visible` fits, for launches that are recorded once for many of them.

    Attributes:
        documents: N, counted with empty ones.
        longest: Tokens of the longest, or more.
        keys: Of all that are gathered for branches.
        longest_keys: Keys of the document with most, or more.
    """

    documents: int
    longest: int
    keys: int = 0
    longest_keys: int = 0


def _power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _fill(to: torch.Tensor, values: torch.Tensor, rest: torch.Tensor) -> None:
    to[: len(values)] = values
    to[len(values) :] = rest


@dataclass(frozen=True, slots=True)
class Attended:
    """What the backward needs of a forward beside q, k and v.

    Attributes:
        out: (B, T, H, D).
        lse: Log-sum-exp in float32 (float64 for float64), in the shape that the backend wants it back: (H, B T), or
            (B, H, T) with or without a last dimension of one.
        backend: Which one it was.
        more: Further values that the backend handed out for its backward.
    """

    out: torch.Tensor
    lse: torch.Tensor
    backend: str
    more: tuple[Any, ...] = ()


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, visible: Visible) -> str | None:
    """The implementation for inputs of this kind; None where only the reference would do, on a GPU."""
    if device.type != "cuda":
        return "reference"
    if dtype not in _HALF or head_dim % 8 or head_dim > 256 or dispatch.capability(device) < (8, 0):
        return None
    hopper = dispatch.capability(device) >= (9, 0) and head_dim <= 128
    if hopper and visible.single and not visible.window and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash"


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visible, scale: float, backend: str
) -> Attended:
    """Attend, without autograd.

    Args:
        q: (B, T, H, D), D adjacent.
        k: (B, T, Hk, D); Hk divides H.
        v: (B, T, Hk, D).
        visible: Who sees whom.
        scale: Of the scores.
        backend: One of ``BACKENDS``.
    """
    if backend == "cudnn":
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *more = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False, scale=scale
        )
        return Attended(out.transpose(1, 2), lse, backend, tuple(more[:6]))
    if backend == "flash":
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse, *more = torch.ops.aten._flash_attention_forward(
            *_gathered(visible, *flat), *_bounds(visible), 0.0, True, False, scale=scale, **_window(visible)
        )
        return Attended(out.view(q.shape), lse, backend, tuple(more[:2]))
    if backend != "reference":
        raise ConfigError("Unknown attention backend", got=backend, do=f"Use one of {BACKENDS}.")
    scores, wide_v = _scores(q, k, visible, scale), _by_head(v, q)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse[..., None]) @ wide_v
    return Attended(out.transpose(1, 2).to(q.dtype).contiguous(), lse, backend)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attended: Attended,
    visible: Visible,
    scale: float,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), shaped like q, k and v, of ``dout`` (B, T, H, D).

    Args:
        dout: Gradient of the output.
        q: As in the forward, like k, v, ``visible`` and ``scale``.
        k: See q.
        v: See q.
        attended: What the forward gave.
        visible: See q.
        scale: See q.
        groups: Of key heads with their query heads, one after the other: the backends hold dq in float32, and dk and
            dv of every query head apart, of one group at a time.
    """
    if groups > 1:
        return _by_groups(dout, q, k, v, attended, visible, scale, min(groups, k.shape[2]))
    if attended.backend == "cudnn":
        heads = (x.transpose(1, 2) for x in (dout, q, k, v, attended.out))
        cu_q, cu_k, max_q, max_k, seed, offset = attended.more
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads, attended.lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in found)
    if attended.backend == "flash":
        do, *inputs, out = (x.flatten(0, 1) for x in (dout, q, k, v, attended.out))
        inputs = _gathered(visible, *inputs)
        limits, more = _bounds(visible), attended.more
        dq, *others = torch.ops.aten._flash_attention_backward(
            do, *inputs, out, attended.lse, *limits, 0.0, True, *more, scale=scale, **_window(visible)
        )
        found = dq, *(_scattered(visible, x, len(dq)) for x in others)
        return tuple(x.view(like.shape) for x, like in zip(found, (q, k, v), strict=True))
    return _reference_backward(dout, q, k, v, attended, visible, scale)


def _by_groups(dout, q, k, v, attended, visible, scale, groups):
    found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    each, ratio = -(-k.shape[2] // groups), q.shape[2] // k.shape[2]
    for start in range(0, k.shape[2], each):
        few, many = slice(start, start + each), slice(start * ratio, (start + each) * ratio)
        lse = attended.lse[many] if attended.lse.dim() == 2 else attended.lse[:, many].contiguous()
        own = replace(attended, out=attended.out[:, :, many], lse=lse)
        grads = attention_backward(dout[:, :, many], q[:, :, many], k[:, :, few], v[:, :, few], own, visible, scale)
        for to, grad, heads in zip(found, grads, (many, few, few), strict=True):
            to[:, :, heads] = grad
    return found


def _reference_backward(dout, q, k, v, attended, visible, scale):
    p = torch.exp(_scores(q, k, visible, scale) - attended.lse[..., None])
    wide_k, wide_v, wide_q = _by_head(k, q), _by_head(v, q), _by_head(q, q)
    do, out = _by_head(dout, q), _by_head(attended.out, q)
    ds = p * (do @ wide_v.transpose(-1, -2) - (do * out).sum(-1, keepdim=True)) * scale
    dq = ds @ wide_k
    dk, dv = (x.transpose(-1, -2) @ y for x, y in ((ds, wide_q), (p, do)))
    groups = q.shape[2] // k.shape[2]
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2).to(q.dtype) for x in (dq, dk, dv))


def _scores(q: torch.Tensor, k: torch.Tensor, visible: Visible, scale: float) -> torch.Tensor:
    scores = _by_head(q, q) @ _by_head(k, q).transpose(-1, -2) * scale
    return scores.masked_fill(~visible.mask(q.shape[0], q.shape[1]), float("-inf"))


def _by_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) in the dtype of computation, keys and values repeated for each query head."""
    wide = x.transpose(1, 2).to(dispatch.compute_dtype(x.dtype))
    return wide.repeat_interleave(q.shape[2] // x.shape[2], dim=1)


def _bounds(visible: Visible) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Bounds of queries and of keys, and the most of each."""
    cu, longest = visible.cu_seqlens, visible.longest
    if visible.branches is None:
        return cu, cu, longest, longest
    return cu, visible.branches.keys.cu_seqlens, longest, visible.branches.keys.longest


def _gathered(visible: Visible, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Queries, and the keys and values that they see document by document."""
    if visible.branches is None:
        return [q, k, v]
    gathered = visible.branches.gathered
    if visible.branches.padded:
        gathered = gathered.clamp(max=len(k) - 1)
    return [q, k[gathered], v[gathered]]


def _scattered(visible: Visible, grad: torch.Tensor, tokens: int) -> torch.Tensor:
    """The gradient of keys or values, from that of the gathered ones."""
    if visible.branches is None:
        return grad
    added = grad.new_zeros(tokens + visible.branches.padded, *grad.shape[1:])
    return added.index_add_(0, visible.branches.gathered, grad)[:tokens]


def _window(visible: Visible) -> dict[str, int]:
    return {"window_size_left": visible.window - 1, "window_size_right": 0} if visible.window else {}
