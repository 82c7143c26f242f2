"""Causal attention of several tokens a sequence over keys and values kept in pages, their own among them.

Shapes: T tokens of several sequences, H query heads in groups of G over K key heads, D head dimension, pages of P
tokens. For the token at position p of a sequence with keys and values k_n, v_n found through its page table::

    s_n = softcap tanh(scale q.k_n / softcap)      (no softcap: scale q.k_n)
    n is visible if n <= p and n > p - window      (no window: n <= p)
    o   = sum_n exp(s_n) v_n / sum_n exp(s_n)

The tokens are given as tiles, each of at most :data:`TILE` consecutive ones of one sequence; one program computes a
tile for one key head, all its query heads together (Dao et al. 2023; paging after Kwon et al. 2023, arXiv:2309.06180).
Pages may hold eight-bit floats; products are of the queries' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.paged_attention import load_tokens
from unsloth.kernels.rounding import must_round, nearest

TILE = 16
CACHE_DTYPES = (*dispatch.FLOAT_DTYPES, torch.float8_e4m3fn)


def make_tiles(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(tiles, 4) int32: first token in the batch, count, position of the first, row of the table; most work first.

    Args:
        spans: Number of tokens of each sequence, and the position of the first of them.
    """
    tiles = []
    first = 0
    for row, (count, start) in enumerate(spans):
        for i in range(0, count, TILE):
            tiles.append((first + i, min(TILE, count - i), start + i, row))
        first += count
    tiles.sort(key=lambda tile: -tile[2])
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4)


def paged_prefill_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The formula, one tile at a time, in float32 at least."""
    dtype = dispatch.compute_dtype(q.dtype)
    groups, size = q.shape[1] // k_cache.shape[2], k_cache.shape[1]
    out = torch.empty_like(q)
    for first, count, start, row in tiles.tolist():
        stop = start + count
        if row >= len(table) or stop > table.shape[1] * size:
            do = f"The table has {len(table)} rows, with room for {table.shape[1]} pages of {size} each."
            raise ConfigError("A tile ends beyond its row of the page table", got=(row, stop), do=do)
        pages = table[row, : -(-stop // size)].long()
        k, v = (gather_pages(c, pages).flatten(0, 1)[:stop].to(dtype) for c in (k_cache, v_cache))
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("thd,nhd->htn", q[first : first + count].to(dtype), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        gap = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(stop, device=q.device)
        visible = (gap >= 0) & (gap < window) if window else gap >= 0
        p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[first : first + count] = torch.einsum("htn,nhd->thd", p, v).to(q.dtype)
    return out


def gather_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """(..., P, K, D) of these pages; torch cannot index eight-bit floats everywhere."""
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8)[pages].view(cache.dtype)
    return cache[pages]


@triton.jit
def load_page(
    k_ptr, v_ptr, table_row, n0, d, D, head, page_size, page_stride, token_stride, head_stride, v_page_stride,
    v_token_stride, v_head_stride, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What :func:`load_tokens` gives for BLOCK_N tokens that exist and are of one page: one place for all of them."""
    page = tl.load(table_row + n0 // page_size).to(tl.int64)
    within = n0 % page_size
    n = tl.arange(0, BLOCK_N)
    k_first = k_ptr + page * page_stride + within * token_stride + head * head_stride
    k = tl.load(k_first + (n[None, :] * token_stride + d[:, None]), mask=d[:, None] < D, other=0.0)
    v_first = v_ptr + page * v_page_stride + within * v_token_stride + head * v_head_stride
    v = tl.load(v_first + (n[:, None] * v_token_stride + d[None, :]), mask=d[None, :] < D, other=0.0)
    return k, v


@triton.jit
def scores(q, k, scale, softcap, CAP: tl.constexpr):
    """Scores in units of log(2), so that 2^s is their exponential."""
    s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * (scale * (1.0 if CAP else 1.4426950408889634))
    if CAP:
        s = (1.4426950408889634 * softcap) * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s


@triton.jit
def take_powers(s, v, top, total, acc):
    """One step of a softmax that goes on, of scores in units of log(2)."""
    new_top = tl.maximum(top, tl.max(s, axis=1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride", "table_rows", "table_columns", "window", "tokens"])
def paged_prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, tiles_ptr, out_ptr, q_stride_t, q_stride_h, page_stride, token_stride, head_stride,
    v_page_stride, v_token_stride, v_head_stride, out_stride_t, out_stride_h, table_stride, table_rows, table_columns,
    scale, softcap, window, tokens, G, D, page_size,
    CAP: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr, ONE_PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a (tile, key head); rows of its matrices are the pairs of token and query head.

    Keys that all tokens of the tile see come first, without masks; ONE_PAGE says that BLOCK_N of them, from a multiple
    of BLOCK_N on, lie in one page.
    """
    tile = tiles_ptr + tl.program_id(0) * 4
    head = tl.program_id(1)
    first = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    start = tl.load(tile + 2)
    row = tl.load(tile + 3).to(tl.int64)
    m = tl.arange(0, BLOCK_T * BLOCK_G)
    t = m // BLOCK_G
    g = m % BLOCK_G
    d = tl.arange(0, BLOCK_D)
    live = ((t < count) & (first + t < tokens) & (g < G))[:, None] & (d[None, :] < D)
    q_at = q_ptr + (first + t)[:, None] * q_stride_t + (head * G + g)[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_at, mask=live, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    position = start + t
    room = tl.where(row < table_rows, table_columns * page_size, 0)
    stop = tl.minimum(start + count, room)  # nothing is read beyond the table's row
    table_row = table_ptr + row * table_stride
    top = tl.full([BLOCK_T * BLOCK_G], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_T * BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_T * BLOCK_G, BLOCK_D], tl.float32)
    begin = start * 0
    if WINDOW:
        begin = tl.maximum(start - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        begin = tl.minimum(start + 1, room) // BLOCK_N * BLOCK_N
        for n0 in range(0, begin, BLOCK_N):
            if ONE_PAGE:
                k, v = load_page(
                    k_ptr, v_ptr, table_row, n0, d, D, head, page_size, page_stride, token_stride, head_stride,
                    v_page_stride, v_token_stride, v_head_stride, BLOCK_N,
                )  # fmt: skip
            else:
                k, v = load_tokens(
                    k_ptr, v_ptr, table_row, n0 + tl.arange(0, BLOCK_N), begin, d, D, head, page_size, page_stride,
                    token_stride, head_stride, v_page_stride, v_token_stride, v_head_stride,
                )  # fmt: skip
            s = scores(q, k, scale, softcap, CAP)
            top, total, acc = take_powers(s, v.to(q.dtype), top, total, acc)
    for n0 in range(begin, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k, v = load_tokens(
            k_ptr, v_ptr, table_row, n, stop, d, D, head, page_size, page_stride, token_stride, head_stride,
            v_page_stride, v_token_stride, v_head_stride,
        )  # fmt: skip
        s = scores(q, k, scale, softcap, CAP)
        visible = n[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (n[None, :] > position[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
        top, total, acc = take_powers(s, v.to(q.dtype), top, total, acc)
    total = tl.where(position < room, total, float("nan"))
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_at = out_ptr + (first + t)[:, None] * out_stride_t + (head * G + g)[:, None] * out_stride_h + d[None, :]
    tl.store(out_at, nearest(out, ROUND), mask=live)


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    fast: bool = True,
) -> torch.Tensor:
    """Attention of the tokens of the tiles; no gradient.

    Args:
        q: (T, H, D).
        k_cache: (pages, P, K, D), unit stride along D; K divides H. Of q's dtype, or E4M3.
        v_cache: Like ``k_cache``.
        table: (sequences, most pages of one) int32; entries beyond a sequence's last tile are not read.
            Tokens whose own place is beyond the row come out as NaN where kernels run, and are an error of the plain
            computation.
        tiles: As :func:`make_tiles` gives them, on q's device; together they hold every token once.
        scale: Of the scores.
        window: How many of the newest tokens are visible, itself included; 0 for all.
        softcap: Bound of the scores; 0 for none.
        fast: False for the plain computation, which waits for the device.

    Returns:
        (T, H, D).
    """
    dispatch.check_tensors("paged_prefill", q=q, k_cache=k_cache, v_cache=v_cache)
    dispatch.check_device("paged_prefill", q.device, table=table, tiles=tiles)
    dispatch.check_integers("paged_prefill", table=table, tiles=tiles)
    if table.dim() != 2 or tiles.dim() != 2 or tiles.shape[1] != 4:
        got = (tuple(table.shape), tuple(tiles.shape))
        raise ConfigError("paged_prefill: table or tiles have the wrong shape", got=got, do="Use make_tiles' tiles.")
    table, tiles = table if table.stride(1) == 1 else table.contiguous(), tiles.contiguous()
    if (
        q.dim() != 3
        or k_cache.dim() != 4
        or k_cache.shape != v_cache.shape
        or k_cache.shape[3] != q.shape[2]
        or q.shape[1] % k_cache.shape[2]
    ):
        raise ConfigError(
            "Queries and cache do not fit",
            got=(tuple(q.shape), tuple(k_cache.shape), tuple(v_cache.shape)),
            do="Pass q (T, H, D) and caches (pages, P, K, D) with K dividing H.",
        )
    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn) or v_cache.dtype != k_cache.dtype:
        raise ConfigError("Queries and cache differ in dtype", got=(q.dtype, k_cache.dtype), do="Cast the queries.")
    dim, heads, kv_heads = q.shape[2], q.shape[1], k_cache.shape[2]
    adjacent = k_cache.stride(3) == 1 and v_cache.stride(3) == 1 and dim <= 256
    if not fast or not adjacent or not dispatch.can_launch(q) or not dispatch.can_launch(k_cache, dtypes=CACHE_DTYPES):
        return paged_prefill_reference(q, k_cache, v_cache, table, tiles, scale=scale, window=window, softcap=softcap)
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keys = block_keys(dim, q.device)
    if len(tiles):
        with dispatch.launch_on(q):
            paged_prefill_kernel[(len(tiles), kv_heads)](
                q, k_cache, v_cache, table, tiles, out, q.stride(0), q.stride(1), *k_cache.stride()[:3],
                *v_cache.stride()[:3], out.stride(0), out.stride(1), table.stride(0), *table.shape, scale, softcap,
                window, len(q), heads // kv_heads, dim, k_cache.shape[1], CAP=softcap > 0, WINDOW=window > 0,
                UPCAST=dispatch.interpreting(), ROUND=must_round(q.dtype), ONE_PAGE=k_cache.shape[1] % keys == 0,
                BLOCK_T=TILE, BLOCK_G=triton.next_power_of_2(heads // kv_heads), BLOCK_N=keys,
                BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=4, num_stages=2,
            )  # fmt: skip
    return out


def block_keys(dim: int, device: torch.device) -> int:
    """Keys of a tile."""
    large = dispatch.interpreting() or dispatch.capability(device) in ((8, 0), (9, 0), (10, 0))
    return 64 if large and dim <= 128 else 32


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    constants = {
        "CAP": False,
        "WINDOW": False,
        "ONE_PAGE": True,
        "UPCAST": False,
        "ROUND": False,
        "BLOCK_T": TILE,
        "BLOCK_N": 32,
    }
    names = [name for name in paged_prefill_kernel.arg_names if not name.isupper() or name in ("G", "D")]
    signature = dict.fromkeys(names, "i32") | {"scale": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{float_dtype}")
    signature |= {"table_ptr": "*i32", "tiles_ptr": "*i32"}
    shapes = ((4, 64), (1, 128), (4, 128))
    return [
        (paged_prefill_kernel, signature, {**constants, "BLOCK_G": g, "BLOCK_D": d}, {"num_warps": 4, "num_stages": 2})
        for g, d in shapes
    ]
