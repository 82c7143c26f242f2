"""Linears of many experts at once, with low-rank adapters: rows sorted by expert, one product for all of them.

Shapes: M rows (a token once for every expert it goes to), sorted so that expert e owns the rows from ``ends[e - 1]`` to
``ends[e]``; E experts, weight (E, O, K) frozen, adapters A (E, r, K), B (E, O, r), scale s. For a row of expert e::

    t = x A_e^T           y = x W_e^T + s t B_e^T
    p = s g B_e           dx = g W_e + p A_e
    dA_e = sum_rows p^T x                   dB_e = s sum_rows g^T t

The products are torch's grouped matrix product where it takes the dtype and every row is 16-byte aligned; otherwise one
product an expert, whose bounds are read from the device. Saved for the backward: x and t.
"""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch

_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The formula in plain torch, an expert at a time, differentiable in everything."""
    parts, first = [], 0
    for e, last in enumerate(ends.tolist()):
        rows = x[first:last]
        y = rows @ weight[e].to(x.dtype).t()
        if a is not None and b is not None:
            y = y + (rows @ a[e].to(x.dtype).t()) @ b[e].to(x.dtype).t() * scale
        parts.append(y)
        first = last
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Row m of expert e times ``weight[e]``: (M, K) and (E, K, O) to (M, O)."""
    if _aligned(x, weight):
        return grouped_mm(x, weight, offs=ends)
    out = torch.empty(x.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    for e, rows in enumerate(_ranges(ends)):
        torch.mm(x[rows], weight[e], out=out[rows])
    return out


def grouped_outer(g: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``g^T x`` over the rows of each expert: (M, O) and (M, K) to (E, O, K); zeros for an expert without rows."""
    if _aligned(g, x):
        return grouped_mm(g.t(), x, offs=ends)
    out = torch.empty(ends.shape[0], g.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for e, rows in enumerate(_ranges(ends)):
        torch.mm(g[rows].t(), x[rows], out=out[e])
    return out


class _GroupedLora(torch.autograd.Function):
    """(x, weight, ends, a, b, scale, dtype) to y."""

    @staticmethod
    def forward(ctx, x, weight, ends, a, b, scale, dtype):
        """See the module."""
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).contiguous()
            y = grouped_product(flat, weight.transpose(1, 2), ends)
            t = None
            if a is not None:
                t = grouped_product(flat, a.to(dtype).transpose(1, 2), ends)
                y += grouped_product(t, (b * scale).to(dtype).transpose(1, 2), ends)
        ctx.save_for_backward(flat, t, weight, ends, a, b)
        ctx.scale, ctx.dtype, ctx.x_dtype = scale, dtype, x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of x, a and b."""
        x, t, weight, ends, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = da = db = None
        with torch.autocast(x.device.type, enabled=False):
            g = grad.to(ctx.dtype).contiguous()
            p = None if a is None else grouped_product(g, (b * ctx.scale).to(ctx.dtype), ends)
            if needs[0]:
                dx = grouped_product(g, weight, ends)
                if p is not None:
                    dx += grouped_product(p, a.to(ctx.dtype), ends)
                dx = dx.to(ctx.x_dtype)
            if needs[3]:
                da = grouped_outer(p, x, ends).to(a.dtype)
            if needs[4]:
                db = grouped_outer(g, t, ends).to(b.dtype) * ctx.scale
        return dx, None, None, da, db, None, None


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these: dtype, some rows, one unit stride and 16-byte rows."""
    first = tensors[0]
    if first.dtype not in _GROUPED_DTYPES or any(t.numel() == 0 for t in tensors):
        return False
    if first.is_cuda and (first.dtype != torch.bfloat16 or torch.cuda.get_device_capability(first.device) < (8, 0)):
        return False
    step = 16 // first.element_size()
    for t in tensors:
        inner = sorted((t.stride(-1), t.stride(-2)))
        if inner[0] != 1 or any(s % step for s in (inner[1], *t.stride()[:-2])) or any(n % step for n in t.shape[1:]):
            return False
    return True


def _ranges(ends: torch.Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """``x W_e^T + scale (x A_e^T) B_e^T`` for rows sorted by expert e.

    Args:
        x: (M, K), all rows of expert 0 first.
        weight: (E, O, K); frozen (one that requires a gradient is taken by the reference).
        ends: (E,) int32, the row after each expert's last; the last entry is M.
        a: (E, r, K) or None; any float dtype, its gradient in that dtype.
        b: (E, O, r) or None.
        scale: Of the adapter.
        fast: False for the plain computation.

    Returns:
        (M, O).
    """
    _check(x, weight, ends, a, b)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not fast or (torch.is_grad_enabled() and weight.requires_grad):
        return grouped_linear_reference(x.to(dtype), weight, ends, a, b, scale)
    if weight.dtype != dtype:
        raise ConfigError(
            "Weight and input differ in dtype", got=(weight.dtype, dtype), do="Cast the input, or use autocast."
        )
    return _GroupedLora.apply(x, weight, ends.to(torch.int32), a, b, scale, dtype)


def _check(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None
) -> None:
    dispatch.check_tensors("grouped_linear", x=x, weight=weight, a=a, b=b)
    dispatch.check_device("grouped_linear", x.device, ends=ends)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ConfigError(
            "Rows and expert weights do not fit",
            got=(tuple(x.shape), tuple(weight.shape)),
            do="Pass rows (M, K) and weights (E, O, K).",
        )
    if ends.shape != weight.shape[:1] or ends.dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            "One integer end an expert is needed", got=(ends.dtype, tuple(ends.shape)), do="Pass (E,) int32."
        )
    if ends.device.type == "cpu" and [0, *ends.tolist()] != sorted([0, *ends.tolist()][:-1]) + [len(x)]:
        do = f"Pass ends that rise from expert to expert, to {len(x)} in the end."
        raise ConfigError("The experts' ends do not cover the rows", got=ends.tolist(), do=do)
    if (a is None) != (b is None):
        raise ConfigError("An adapter has an A and a B", got=("A" if b is None else "B"), do="Pass both or neither.")
    if a is not None and b is not None:
        experts, out, features = weight.shape
        rank = a.shape[1] if a.dim() == 3 else -1
        if a.shape != (experts, rank, features) or b.shape != (experts, out, rank):
            raise ConfigError(
                "The adapter does not fit the experts",
                got=f"A {tuple(a.shape)}, B {tuple(b.shape)}, weight {tuple(weight.shape)}",
                do="Pass A (E, r, K) and B (E, O, r).",
            )
