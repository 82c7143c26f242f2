"""The gated activation between an MLP's products, with the thin products of its adapters made in the same pass.

Shapes: M tokens, I intermediate features, gate e and up u (M, I), ranks r small; a = silu (Shazeer 2020,
arXiv:2002.05202), gelu or gelu_tanh::

    forward:   h = a(e) u                               t = h A_d^T            (M, r_d)
    backward:  h again    du = dh a(e)                  de = dh u a'(e)
               dA_d = p_d^T h     dB_g = s_g de^T t_g   dB_u = s_u du^T t_u    with p_d = g s_d B_d, t = x A^T

Bytes: 3 M I elements forward, 5 M I backward. Separate products would read h once more in the forward, and write and
read h and read de and du once more in the backward: 9 M I in place of 5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.append_projection import append_projection, matmul_wide
from unsloth.kernels.approximate import exponential, reciprocal
from unsloth.kernels.column_sum import column_sum
from unsloth.kernels.rounding import must_round, nearest

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_MOST_RANK = 64
_FORWARD_SPLITS = 2


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``a(gate) * up`` in plain torch, differentiable."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


@triton.jit
def _sigmoid(x, INTERPRET: tl.constexpr):
    """Four instructions; :func:`tl.sigmoid` takes 14."""
    return reciprocal(1.0 + exponential(-x, INTERPRET), INTERPRET)


@triton.jit
def _activate(e, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr):
    """(a(e), a'(e)) in float32.

    Not :func:`unsloth.kernels.glu.activate`, whose sigmoid is exact to the last place: here the arithmetic shares the
    multiprocessors with a product, and that sigmoid made the forward 3.3 times as long, the backward 1.9 times.
    """
    if ACTIVATION == 0:
        s = _sigmoid(e, UPCAST)
        value = e * s
        slope = s * (1.0 + e * (1.0 - s))
    elif ACTIVATION == 1:
        cdf = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        value = e * cdf
        slope = cdf + e * 0.3989422804014327 * exponential(-0.5 * e * e, UPCAST)
    else:
        square = e * e
        t = 2.0 * _sigmoid(1.5957691216057308 * e * (1.0 + 0.044715 * square), UPCAST) - 1.0
        value = 0.5 * e * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * e * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * square)
    return value, slope


@triton.jit
def glu_forward_kernel(
    e_ptr,
    u_ptr,
    a_ptr,
    h_ptr,
    part_ptr,
    M,
    I,  # noqa: E741  the name in the formulas
    R,
    features_a_split,
    e_stride,
    u_stride,
    a_stride,
    h_stride,
    EARLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADAPT: tl.constexpr,
    UPCAST: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program a block of rows and a share of the features, whose part of h A^T it writes in float32."""
    if EARLY:
        gdc_wait()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = rows[:, None].to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * features_a_split
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(first, tl.minimum(first + features_a_split, I), BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = (rows[:, None] < M) & (i[None, :] < I)
        e = tl.load(e_ptr + m * e_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + m * u_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        value, _ = _activate(e, ACTIVATION, UPCAST)
        h = nearest(value * u, ROUND)
        tl.store(h_ptr + m * h_stride + i[None, :], h, mask=inside)
        if ADAPT:
            a = tl.load(a_ptr + r[None, :] * a_stride + i[:, None], mask=(r[None, :] < R) & (i[:, None] < I), other=0.0)
            if UPCAST:
                acc = tl.dot(h, a.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(h.to(a.dtype), a, acc, input_precision="ieee")
    if ADAPT:
        inside = (rows[:, None] < M) & (r[None, :] < R)
        tl.store(part_ptr + (split.to(tl.int64) * M + m) * R + r[None, :], acc, mask=inside)


@triton.jit
def _accumulate(acc, thin_ptr, stride, rows, M, R, wide, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr):
    """``acc += thin^T wide`` for a block of rows; thin (M, R) in memory, wide (rows, I) in registers."""
    r = tl.arange(0, BLOCK_R)
    thin = tl.load(
        thin_ptr + rows[None, :].to(tl.int64) * stride + r[:, None],
        mask=(rows[None, :] < M) & (r[:, None] < R),
        other=0.0,
    )
    if UPCAST:
        return tl.dot(thin.to(tl.float32), wide, acc, input_precision="ieee")
    return tl.dot(thin, wide.to(thin.dtype), acc, input_precision="ieee")


@triton.jit
def glu_backward_kernel(
    dh_ptr,
    e_ptr,
    u_ptr,
    p_ptr,
    tg_ptr,
    tu_ptr,
    de_ptr,
    du_ptr,
    h_ptr,
    part_ptr,
    M,
    I,  # noqa: E741
    R_D,
    R_G,
    R_U,
    rows_a_split,
    scale_g,
    scale_u,
    dh_stride,
    e_stride,
    u_stride,
    p_stride,
    t_stride,
    de_stride,
    h_stride,
    EARLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADAPT: tl.constexpr,
    WRITE_H: tl.constexpr,
    UPCAST: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program a block of columns and a share of the rows, whose adapter gradients it sums.

    A share's sums lie one after the other: dA_d (R_D, I), dB_g (I, R_G), dB_u (I, R_U).
    """
    if EARLY:
        gdc_wait()
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, M)
    da = tl.zeros([BLOCK_D, BLOCK_I], tl.float32)
    dbg = tl.zeros([BLOCK_G, BLOCK_I], tl.float32)
    dbu = tl.zeros([BLOCK_G, BLOCK_I], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        m = rows[:, None].to(tl.int64)
        inside = (rows[:, None] < last) & (i[None, :] < I)
        e = tl.load(e_ptr + m * e_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + m * u_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + m * dh_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        value, slope = _activate(e, ACTIVATION, UPCAST)
        de = nearest(dh * u * slope, ROUND)
        du = nearest(dh * value, ROUND)
        tl.store(de_ptr + m * de_stride + i[None, :], de, mask=inside)
        tl.store(du_ptr + m * de_stride + i[None, :], du, mask=inside)
        h = nearest(value * u, ROUND)
        if WRITE_H:
            tl.store(h_ptr + m * h_stride + i[None, :], h, mask=inside)
        if ADAPT:
            da = _accumulate(da, p_ptr, p_stride, rows, last, R_D, h, UPCAST, BLOCK_D)
            dbg = _accumulate(dbg, tg_ptr, t_stride, rows, last, R_G, de, UPCAST, BLOCK_G)
            dbu = _accumulate(dbu, tu_ptr, t_stride, rows, last, R_U, du, UPCAST, BLOCK_G)
    if ADAPT:
        d = tl.arange(0, BLOCK_D)
        g = tl.arange(0, BLOCK_G)
        at_a = part_ptr + split.to(tl.int64) * (R_D + R_G + R_U) * I
        at_g = at_a + R_D * I
        at_u = at_g + R_G * I
        tl.store(at_a + d[:, None] * I + i[None, :], da, mask=(d[:, None] < R_D) & (i[None, :] < I))
        inside = i[:, None] < I
        tl.store(at_g + i[:, None] * R_G + g[None, :], tl.trans(dbg) * scale_g, mask=inside & (g[None, :] < R_G))
        tl.store(at_u + i[:, None] * R_U + g[None, :], tl.trans(dbu) * scale_u, mask=inside & (g[None, :] < R_U))


def glu_forward(
    gate_up: torch.Tensor, activation: str, a: torch.Tensor, h: torch.Tensor, tail: torch.Tensor
) -> torch.Tensor:
    """Write ``h = a(gate) up`` and ``tail = h A^T``; return the latter once more, in memory of its own.

    Args:
        gate_up: (M, 2 I), unit stride along the features.
        activation: One of ``ACTIVATIONS``.
        a: (R, I) of the same dtype; R may be 0.
        h: (M, I), unit stride along I.
        tail: (M, R), unit stride along R.
    """
    kind = _kind(activation)
    rows, features = h.shape
    gate, up = gate_up[:, :features], gate_up[:, features:]
    rank = a.shape[0]
    if not dispatch.can_launch(gate_up, h):
        h.copy_(gated_activation_reference(gate, up, activation))
        if rank:
            append_projection(h, a.t(), tail)
        return tail.clone()
    adapt = 0 < rank <= _MOST_RANK
    if rows and features:
        shape = _forward_tile(h, rank if adapt else 0)
        share = triton.cdiv(features, _FORWARD_SPLITS * shape["BLOCK_I"]) * shape["BLOCK_I"]
        splits = triton.cdiv(features, share)
        parts = torch.empty(splits, rows, rank, dtype=torch.float32, device=h.device) if adapt else h
        early = dispatch.overlaps_launches(h.device)
        with dispatch.launch_on(h):
            glu_forward_kernel[(triton.cdiv(rows, shape["BLOCK_M"]), splits)](
                gate,
                up,
                a if adapt else h,
                h,
                parts,
                rows,
                features,
                rank,
                share,
                gate.stride(0),
                up.stride(0),
                a.stride(0),
                h.stride(0),
                EARLY=early,
                ACTIVATION=kind,
                ADAPT=adapt,
                UPCAST=_exactly(h),
                ROUND=must_round(h.dtype),
                **shape,
                **dispatch.early_launch(early),
            )
        if adapt:
            return column_sum(parts.view(splits, -1), h.dtype, also=tail).view(rows, rank)
    if rank and not adapt:
        append_projection(h, a.t(), tail)
    return tail.clone()


def glu_backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    activation: str,
    p: torch.Tensor,
    t: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write ``[de | du]``; return the adapters' gradients that need h, de and du, in float32.

    Args:
        dh: (M, I).
        gate_up: (M, 2 I), as in the forward.
        activation: One of ``ACTIVATIONS``.
        p: (M, R_d) g sB of the down projection's adapter.
        t: (M, R_g) and (M, R_u): x A^T of the gate's and the up projection's adapters, of one row stride.
        out: (M, 2 I), unit stride along the features.
        scales: s_g and s_u.

    Returns:
        p^T h (R_d, I), s_g de^T t_g (I, R_g), s_u du^T t_u (I, R_u).
    """
    kind = _kind(activation)
    rows, features = dh.shape
    gate, up = gate_up[:, :features], gate_up[:, features:]
    de, du = out[:, :features], out[:, features:]
    ranks = (p.shape[1], t[0].shape[1], t[1].shape[1])
    if not dispatch.can_launch(dh, gate_up, out) or not rows:
        return _glu_backward_torch(dh, gate, up, activation, p, t, de, du, scales)
    adapt, early = max(ranks) <= _MOST_RANK, dispatch.overlaps_launches(dh.device)
    h = dh if adapt else torch.empty_like(dh)
    shape, splits = _backward_tile(dh, ranks)
    splits = min(splits, triton.cdiv(rows, shape["BLOCK_M"]))
    share = triton.cdiv(rows, splits * shape["BLOCK_M"]) * shape["BLOCK_M"]
    splits = triton.cdiv(rows, share)
    parts = torch.empty(splits, sum(ranks) * features, dtype=torch.float32, device=dh.device)
    with dispatch.launch_on(dh):
        glu_backward_kernel[(triton.cdiv(features, shape["BLOCK_I"]), splits)](
            dh,
            gate,
            up,
            p if adapt else dh,
            t[0] if adapt else dh,
            t[1] if adapt else dh,
            de,
            du,
            h,
            parts,
            rows,
            features,
            *ranks,
            share,
            *map(float, scales),
            dh.stride(0),
            gate.stride(0),
            up.stride(0),
            p.stride(0),
            t[0].stride(0),
            de.stride(0),
            h.stride(0),
            EARLY=early,
            ACTIVATION=kind,
            ADAPT=adapt,
            WRITE_H=not adapt,
            UPCAST=_exactly(dh),
            ROUND=must_round(dh.dtype),
            **shape,
            **dispatch.early_launch(early),
        )
    if adapt:
        total = parts[0] if splits == 1 else column_sum(parts, torch.float32)
        da, dbg, dbu = total.split([rank * features for rank in ranks])
        return da.view(-1, features), dbg.view(features, -1), dbu.view(features, -1)
    return _thin_products(p, h, t, de, du, scales)


def _glu_backward_torch(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    p: torch.Tensor,
    t: tuple[torch.Tensor, torch.Tensor],
    de: torch.Tensor,
    du: torch.Tensor,
    scales: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        wide_gate, wide_up = (x.detach().to(dispatch.compute_dtype(x.dtype)).requires_grad_() for x in (gate, up))
        h = gated_activation_reference(wide_gate, wide_up, activation)
        grads = torch.autograd.grad(h, [wide_gate, wide_up], dh.to(h.dtype))
    de.copy_(grads[0])
    du.copy_(grads[1])
    return _thin_products(p, h.detach().to(dh.dtype), t, de, du, scales)


def _thin_products(
    p: torch.Tensor,
    h: torch.Tensor,
    t: tuple[torch.Tensor, torch.Tensor],
    de: torch.Tensor,
    du: torch.Tensor,
    scales: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return matmul_wide(p.t(), h), matmul_wide(de.t(), t[0]).mul_(scales[0]), matmul_wide(du.t(), t[1]).mul_(scales[1])


def _kind(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ConfigError("Unknown activation", got=activation, do=f"Use one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[activation]


def _exactly(h: torch.Tensor) -> bool:
    """Whether products and exponentials are those of float32: for float32, and in the interpreter."""
    return dispatch.interpreting() or h.dtype == torch.float32


def _forward_tile(h: torch.Tensor, rank: int) -> dict[str, int]:
    block_r = max(16, triton.next_power_of_2(rank))
    if h.dtype.itemsize > 2:
        return {"BLOCK_M": 32, "BLOCK_I": 32, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}
    shape = {"BLOCK_M": 64, "BLOCK_I": 128, "BLOCK_R": block_r, "num_warps": 8, "num_stages": 3}
    return shape | ({"maxnreg": 128} if block_r <= 32 else {})  # two programs a multiprocessor


def _backward_tile(dh: torch.Tensor, ranks: tuple[int, int, int]) -> tuple[dict[str, int], int]:
    """Tile and launch options, and among how many programs the rows are shared.

    Ranks are padded to the 64 rows of Hopper's products, whose operands come from shared memory: narrower products
    would have the activation in a layout of their own. Shares are the fewest that (nearly) fill whole rounds of
    programs, since each of them leaves a sum to be added.
    """
    block_d, block_g = (max(16, triton.next_power_of_2(min(r, _MOST_RANK))) for r in (ranks[0], max(ranks[1:])))
    shape = {"BLOCK_M": 32, "BLOCK_I": 64, "BLOCK_D": 64, "BLOCK_G": 64, "num_warps": 4, "num_stages": 3}
    resident = dispatch.processor_count(dh.device)
    if dh.dtype.itemsize > 2:
        shape |= {"BLOCK_I": 32, "BLOCK_D": block_d, "BLOCK_G": block_g, "num_stages": 2}
    else:
        resident *= 2  # two programs a multiprocessor
    programs = triton.cdiv(dh.shape[1], shape["BLOCK_I"])
    rounds = [triton.cdiv(programs * splits, resident) / splits for splits in range(1, 9)]
    return shape, 1 + next(i for i, share in enumerate(rounds) if share <= 1.25 * min(rounds))


def compile_examples(float_dtype: str) -> list[tuple]:
    """Signatures for the cross-compilation test: every activation, with and without adapters."""
    pointers = (
        "e_ptr",
        "u_ptr",
        "a_ptr",
        "h_ptr",
        "dh_ptr",
        "p_ptr",
        "tg_ptr",
        "tu_ptr",
        "de_ptr",
        "du_ptr",
    )
    integers = (
        "M",
        "I",
        "R",
        "R_D",
        "R_G",
        "R_U",
        "rows_a_split",
        "features_a_split",
        "e_stride",
        "u_stride",
        "a_stride",
        "h_stride",
    )
    signature = dict.fromkeys(pointers, f"*{float_dtype}") | dict.fromkeys(("part_ptr",), "*fp32")
    signature |= dict.fromkeys((*integers, "dh_stride", "p_stride", "t_stride", "de_stride"), "i32")
    signature |= {"scale_g": "fp32", "scale_u": "fp32"}
    examples: list[tuple] = []
    for kind in ACTIVATIONS.values():
        adapt = kind != 1
        common = {"ACTIVATION": kind, "ADAPT": adapt, "UPCAST": False, "ROUND": False, "BLOCK_M": 32, "BLOCK_I": 64}
        common["EARLY"] = False
        examples.append((glu_forward_kernel, signature, common | {"BLOCK_R": 32}))
        backward = common | {"WRITE_H": not adapt, "BLOCK_D": 32, "BLOCK_G": 32}
        examples.append((glu_backward_kernel, signature, backward, {"num_stages": 2}))
    return examples
