"""Low-rank updates of one input's projections, for the few rows of a decoding step, added to their outputs.

    low = x A^T            A holds the A of every projection and adapter, rank by rank
    y_i += (m * low_i) B_i^T                       or, of a gated unit, act(y_0 + ...) * (y_1 + ...) in one pass

m is the mask (rows, adapters) that says which adapter a row has, each adapter's columns side by side; without it every
row has every one. The first product is shared among programs along K, and their sums are added while the second reads
them: two launches for all projections of one input. There are few shares, all read at once, since every program of the
second waits for them. The low-rank values are rounded to x's dtype once, as torch's product would round them.

Bytes: A and B once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.glu import activate
from unsloth.kernels.glu_adapters import gated_activation_reference
from unsloth.kernels.rounding import must_round, nearest

ROWS = 128
MOST_OUTPUTS = 3
MOST_TILE = 32


def lora_rows(
    x: torch.Tensor,
    a: torch.Tensor,
    b: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    mask: torch.Tensor | None = None,
    *,
    low: torch.Tensor | None = None,
    fast: bool = True,
) -> None:
    """Add the updates to ``outputs``; no gradient.

    Args:
        x: (T, K), adjacent columns.
        a: (len(b) * W, K), contiguous: W rows for each output, divided evenly among the adapters.
        b: (N_i, W) of each output, contiguous.
        outputs: (T, N_i), adjacent columns, of the dtype of all others.
        mask: (T, adapters), 1 where the row has the adapter, else 0; None: every row has every one.
        low: What :func:`project_rows` gave for ``x`` and ``a``; None calls it.
        fast: False takes the plain-torch reference.
    """
    dispatch.check_tensors("lora_rows", x=x, a=a, **{f"b{i}": m for i, m in enumerate(b)})
    dispatch.check_tensors("lora_rows", x=x, **{f"output {i}": y for i, y in enumerate(outputs)})
    dispatch.check_device("lora_rows", x.device, mask=mask)
    matrices = bool(b) and x.dim() == a.dim() == 2 and all(m.dim() == 2 for m in b)
    width = b[0].shape[1] if matrices else -1
    same = all(m.shape[1] == width for m in b) if matrices else False
    if not same or a.shape != (len(b) * width, x.shape[1]) or len(outputs) != len(b):
        got = (tuple(a.shape), [tuple(m.shape) for m in b], len(outputs))
        raise ConfigError("lora_rows: matrices do not fit", got=got, do="Pass A of (outputs * W, K) and B of (N, W).")
    shapes = [(x.shape[0], m.shape[0]) for m in b]
    masked = mask is None or (mask.dim() == 2 and len(mask) == len(x) and mask.shape[1] and not width % mask.shape[1])
    if not masked or [tuple(y.shape) for y in outputs] != shapes:
        found = ([tuple(y.shape) for y in outputs], None if mask is None else tuple(mask.shape))
        do = f"Pass outputs {shapes}, and a mask (T, adapters) whose adapters divide {width} evenly."
        raise ConfigError("lora_rows: outputs or mask do not fit", got=found, do=do)
    if any(m.dtype != a.dtype for m in b):
        raise ConfigError("lora_rows: A and B differ in dtype", got=(a.dtype, [m.dtype for m in b]), do="Cast them.")
    contiguous = all(m is None or m.is_contiguous() for m in (a, mask, *b))
    if not (fast and contiguous and fits(x, a, [*b, *outputs])):
        lora_rows_reference(x, a, b, outputs, mask)
        return
    low = project_rows(x, a) if low is None else low
    splits, rows, ranks = low.shape
    tile = _row_tile(rows)
    sizes = [m.shape[0] for m in b]
    block_n = 64 if rows <= 32 or sum(sizes) <= 8192 else 256  # every program reads its rows' shares again
    tiles = list(itertools.accumulate(triton.cdiv(size, block_n) for size in sizes))
    three_b, three_y = ([*m, *[m[0]] * (MOST_OUTPUTS - len(m))] for m in (list(b), list(outputs)))
    three_n = [*sizes, *[sizes[0]] * (MOST_OUTPUTS - len(sizes))]
    block_w = 32 if width > 16 else 16
    with dispatch.launch_on(x):
        lora_expand_kernel[(tiles[-1], triton.cdiv(rows, tile))](
            low, mask, *three_b, *three_y, *three_n, tiles[0], tiles[1] if len(tiles) > 1 else tiles[0],
            *[y.stride(0) for y in three_y], rows, ranks, width,
            width // (1 if mask is None else mask.shape[1]), 1 if mask is None else mask.shape[1], SPLITS=splits,
            MASKED=mask is not None, UPCAST=dispatch.interpreting(), ROUND=must_round(x.dtype), BLOCK_T=tile,
            BLOCK_N=block_n, BLOCK_W=block_w, num_warps=4 if block_n == 64 else 8, num_stages=1,
        )  # fmt: skip


def project_rows(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Shares of ``x @ a.T`` that add up to it, float32 (shares, T, ranks), for what :func:`fits` accepts."""
    (rows, k), ranks = x.shape, a.shape[0]
    tile, splits = _row_tile(rows), 8 if k <= 8192 else 16
    block_r = 16 if tile == 16 else 32
    low = torch.empty(splits, rows, ranks, dtype=torch.float32, device=x.device)
    with dispatch.launch_on(x):
        lora_shrink_kernel[(triton.cdiv(ranks, block_r), splits, triton.cdiv(rows, tile))](
            x, a, low, rows, ranks, k, triton.cdiv(k, splits), x.stride(0), UPCAST=dispatch.interpreting(),
            BLOCK_T=tile, BLOCK_R=block_r, BLOCK_K=256 if tile == 16 else 128, num_warps=4, num_stages=3,
        )  # fmt: skip
    return low


def gate_rows(
    low: torch.Tensor,
    b: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    activation: str,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """``act(gate) * up`` of two outputs with their updates; the updates are not rounded before they are used.

    Args:
        low: What :func:`project_rows` gave.
        b: B of gate and up, (N, W) each.
        outputs: (T, N) of each without its update, adjacent columns, of the dtype of ``b``.
        mask: See :func:`lora_rows`.
        activation: One of :data:`unsloth.kernels.glu.ACTIVATIONS`.
        fast: False takes the plain-torch reference.

    Returns:
        (T, N).
    """
    (splits, rows, ranks), (gate, up) = low.shape, outputs
    n, width = b[0].shape
    if not fast or not dispatch.can_launch(*b, *outputs):
        return gate_rows_reference(low, b, outputs, mask, activation)
    h = torch.empty(rows, n, dtype=gate.dtype, device=gate.device)
    tile, adapters = _row_tile(rows), 1 if mask is None else mask.shape[1]
    block_n = 64 if rows <= 32 else 128
    with dispatch.launch_on(gate):
        lora_gate_kernel[(triton.cdiv(n, block_n), triton.cdiv(rows, tile))](
            low, mask, *b, gate, up, h, n, gate.stride(0), up.stride(0), rows, ranks, width, width // adapters,
            adapters, ACTIVATION=activation, SPLITS=splits, MASKED=mask is not None, UPCAST=dispatch.interpreting(),
            ROUND=must_round(gate.dtype), BLOCK_T=tile, BLOCK_N=block_n, BLOCK_W=32 if width > 16 else 16,
            num_warps=4 if block_n == 64 else 8, num_stages=1,
        )  # fmt: skip
    return h


def gate_rows_reference(
    low: torch.Tensor,
    b: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """The formula in plain torch; ``low`` and ``b`` are multiplied in the dtype of ``b``, added in float32 at least."""
    wide = dispatch.compute_dtype(outputs[0].dtype)
    sums = []
    for y, part, m in zip(outputs, _masked(low.sum(0).to(b[0].dtype), 2, mask), b, strict=True):
        sums.append(y.to(wide) + part.to(wide) @ m.to(wide).T)
    return gated_activation_reference(sums[0], sums[1], activation).to(outputs[0].dtype)


def _row_tile(rows: int) -> int:
    return min(MOST_TILE, max(16, triton.next_power_of_2(rows)))


def fits(x: torch.Tensor, a: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels can take these: few rows, one dtype, adjacent columns."""
    same = all(t.dtype == x.dtype and t.stride(1) == 1 for t in (x, a, *others))
    few = 0 < x.shape[0] <= ROWS and len(others) <= 2 * MOST_OUTPUTS and x.numel() > 0
    return few and same and a.shape[0] % 16 == 0 and dispatch.can_launch(x, a, *others)


def lora_rows_reference(
    x: torch.Tensor,
    a: torch.Tensor,
    b: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    mask: torch.Tensor | None = None,
) -> None:
    """The formula in plain torch."""
    for y, part, m in zip(outputs, low_rank(x, a, len(b), mask), b, strict=True):
        if y.dtype == m.dtype:
            y.addmm_(part, m.T)
        else:
            y.add_(part @ m.T)


def low_rank(x: torch.Tensor, a: torch.Tensor, outputs: int, mask: torch.Tensor | None) -> Sequence[torch.Tensor]:
    """``m * low_i`` (T, W) of each output."""
    return _masked(x.to(a.dtype) @ a.T, outputs, mask)


def _masked(low: torch.Tensor, outputs: int, mask: torch.Tensor | None) -> Sequence[torch.Tensor]:
    if mask is not None:
        columns = low.view(low.shape[0], outputs, mask.shape[1], -1)
        low = (columns * mask[:, None, :, None].to(low.dtype)).flatten(1)
    return low.chunk(outputs, 1)


@triton.jit(do_not_specialize=["rows", "share"])  # one compilation for every number of rows
def lora_shrink_kernel(
    x, a, low, rows, ranks, k, share, x_stride, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile (BLOCK_T, BLOCK_R) of one share of x A^T; ``low`` is (shares, rows, ranks)."""
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    start = split * share
    stop = tl.minimum(start + share, k)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for at in range(start, stop, BLOCK_K):
        c = at + tl.arange(0, BLOCK_K)
        left = tl.load(x + t[:, None] * x_stride + c[None, :], (t[:, None] < rows) & (c[None, :] < stop), other=0.0)
        right = tl.load(a + r[None, :] * k + c[:, None], (r[None, :] < ranks) & (c[:, None] < stop), other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    out = low + (split * rows + t[:, None]) * ranks + r[None, :]
    tl.store(out, total, (t[:, None] < rows) & (r[None, :] < ranks))


@triton.jit
def updated(
    low, mask, b, y, n_first, n, y_stride, first, rows, ranks, width, rank, adapters, SPLITS: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_T, BLOCK_N) of one output with its update; ``first`` is the output's first column of ``low``."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = n_first + tl.arange(0, BLOCK_N)
    live = (t[:, None] < rows) & (c[None, :] < n)
    total = tl.load(y + t[:, None] * y_stride + c[None, :], live, other=0.0).to(tl.float32)
    for start in range(0, width, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (t[:, None] < rows) & (w[None, :] < width)
        right = tl.load(b + c[None, :] * width + w[:, None], (c[None, :] < n) & (w[:, None] < width), other=0.0)
        part = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
        for split in tl.static_range(SPLITS):
            at = low + (split * rows + t[:, None]) * ranks + first + w[None, :]
            part += tl.load(at, inside, other=0.0)
        if MASKED:
            part = part * tl.load(mask + t[:, None] * adapters + w[None, :] // rank, inside, other=0.0).to(tl.float32)
        part = nearest(part, ROUND).to(b.dtype.element_ty)
        if UPCAST:
            part, right = part.to(tl.float32), right.to(tl.float32)
        total = tl.dot(part, right, total, input_precision="ieee")
    return total


@triton.jit
def add_update(
    low, mask, b, y, n_first, n, y_stride, first, rows, ranks, width, rank, adapters, SPLITS: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Add a tile (BLOCK_T, BLOCK_N) of one output."""
    total = updated(
        low, mask, b, y, n_first, n, y_stride, first, rows, ranks, width, rank, adapters, SPLITS, MASKED, UPCAST,
        ROUND, BLOCK_T, BLOCK_N, BLOCK_W,
    )  # fmt: skip
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = n_first + tl.arange(0, BLOCK_N)
    tl.store(y + t[:, None] * y_stride + c[None, :], nearest(total, ROUND), (t[:, None] < rows) & (c[None, :] < n))


@triton.jit(do_not_specialize=["rows", "adapters"])
def lora_gate_kernel(
    low, mask, b0, b1, gate, up, h, n, gate_stride, up_stride, rows, ranks, width, rank, adapters,
    ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of the contiguous h."""
    n_first = tl.program_id(0) * BLOCK_N
    g = updated(
        low, mask, b0, gate, n_first, n, gate_stride, 0, rows, ranks, width, rank, adapters, SPLITS, MASKED, UPCAST,
        ROUND, BLOCK_T, BLOCK_N, BLOCK_W,
    )  # fmt: skip
    u = updated(
        low, mask, b1, up, n_first, n, up_stride, width, rows, ranks, width, rank, adapters, SPLITS, MASKED, UPCAST,
        ROUND, BLOCK_T, BLOCK_N, BLOCK_W,
    )  # fmt: skip
    value, _ = activate(g, ACTIVATION)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = n_first + tl.arange(0, BLOCK_N)
    tl.store(h + t[:, None] * n + c[None, :], nearest(value * u, ROUND), (t[:, None] < rows) & (c[None, :] < n))


@triton.jit(do_not_specialize=["rows", "adapters", "end0", "end1", "n0", "n1", "n2"])
def lora_expand_kernel(
    low, mask, b0, b1, b2, y0, y1, y2, n0, n1, n2, end0, end1, stride0, stride1, stride2, rows, ranks, width, rank,
    adapters, SPLITS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program adds one tile of one of the outputs."""
    tile = tl.program_id(0)
    if tile < end0:
        add_update(
            low, mask, b0, y0, tile * BLOCK_N, n0, stride0, 0, rows, ranks, width, rank, adapters, SPLITS, MASKED,
            UPCAST, ROUND, BLOCK_T, BLOCK_N, BLOCK_W,
        )  # fmt: skip
    elif tile < end1:
        add_update(
            low, mask, b1, y1, (tile - end0) * BLOCK_N, n1, stride1, width, rows, ranks, width, rank, adapters,
            SPLITS, MASKED, UPCAST, ROUND, BLOCK_T, BLOCK_N, BLOCK_W,
        )  # fmt: skip
    else:
        add_update(
            low, mask, b2, y2, (tile - end1) * BLOCK_N, n2, stride2, 2 * width, rows, ranks, width, rank, adapters,
            SPLITS, MASKED, UPCAST, ROUND, BLOCK_T, BLOCK_N, BLOCK_W,
        )  # fmt: skip


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    examples: list[tuple] = []
    shrink = dict.fromkeys(("rows", "ranks", "k", "share", "x_stride"), "i32")
    shrink |= {"x": f"*{float_dtype}", "a": f"*{float_dtype}", "low": "*fp32"}
    names = [name for name in lora_expand_kernel.arg_names if not name.isupper()]
    expand = dict.fromkeys(names, "i32") | {"low": "*fp32", "mask": f"*{float_dtype}"}
    expand |= {name: f"*{float_dtype}" for name in ("b0", "b1", "b2", "y0", "y1", "y2")}
    names = [name for name in lora_gate_kernel.arg_names if not name.isupper()]
    gate = dict.fromkeys(names, "i32") | {"low": "*fp32"}
    gate |= {name: f"*{float_dtype}" for name in ("mask", "b0", "b1", "gate", "up", "h")}
    for tile, block_n, splits in ((16, 64, 8), (32, 256, 16)):
        shape: dict[str, object] = {
            "UPCAST": False,
            "BLOCK_T": tile,
            "BLOCK_R": tile,
            "BLOCK_K": 256 if tile == 16 else 128,
        }
        examples.append((lora_shrink_kernel, shrink, shape, {"num_warps": 4, "num_stages": 3}))
        shape = {"SPLITS": splits, "MASKED": tile == 16, "UPCAST": False, "ROUND": False, "BLOCK_T": tile}
        shape |= {"BLOCK_N": block_n, "BLOCK_W": 32}
        warps = 4 if block_n == 64 else 8
        examples.append((lora_expand_kernel, expand, shape, {"num_warps": warps, "num_stages": 1}))
        shape = {**shape, "ACTIVATION": "silu", "BLOCK_N": min(block_n, 128)}
        examples.append((lora_gate_kernel, gate, shape, {"num_warps": warps, "num_stages": 1}))
    return examples
