"""Causal attention over documents packed end to end, by whichever implementation is installed and fits.

Shapes: T tokens of B documents, H query heads in groups of G over K key heads, D head dimension; document b is the
tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Within a document, for query i and key j <= i::

    s_ij = softcap tanh(scale q_i.k_j / softcap)          j is visible if i - j < window (no window: always)
    o_i  = sum_j exp(s_ij) v_j / (exp(sink_h) + sum_j exp(s_ij))

Documents may have more keys than queries (:class:`Keys`); the queries are then the last ones.

Implementations: "flash_attn" (the package, where installed), "torch" (FlashAttention inside torch, packed natively),
"flex" (compiled; the one that takes sinks and soft caps together with windows), "sdpa" (one call a document), and
"reference" (block-diagonal mask, whole score matrix). A sink is applied afterwards, as its share of the softmax is
known from the log-sum-exp: ``o = o_without * sigmoid(lse - sink)``.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch

BACKENDS = ("flash_attn", "torch", "flex", "sdpa", "reference")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the keys of each document are, if not where its queries are.

    Attributes:
        cu_seqlens: (B + 1,) int32, from 0 to the number of keys; each document has at least as many as queries.
        longest: Keys of the document with most, or more.
    """

    cu_seqlens: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Branches:
    """Documents of which some begin with keys of others: what each sees, gathered.

    Attributes:
        keys: Bounds of each document's keys among those that are gathered.
        gathered: (Tk,) for each of them, its token.
        padded: Whether some of the last are of no document, which the number of tokens stands for.
    """

    keys: Keys
    gathered: torch.Tensor
    padded: bool = False

    def mask(self, cu_seqlens: torch.Tensor, rows: int, window: int = 0) -> torch.Tensor:
        """Which tokens each token sees, itself and those before it in its keys.

        Args:
            cu_seqlens: Of the queries.
            rows: R, of the batch; a row's tokens see only their own row.
            window: As for :func:`varlen_attention`.

        Returns:
            (R, 1, T / R, T / R) booleans.
        """
        bounds, key_bounds = cu_seqlens.tolist(), self.keys.cu_seqlens.tolist()
        visible = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool, device=self.gathered.device)
        for i, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            seen = self.gathered[key_bounds[i] : key_bounds[i + 1]]
            shape = torch.ones(last - first, len(seen), dtype=torch.bool, device=visible.device)
            offset = len(seen) - (last - first)
            allowed = shape.tril(offset)
            visible[first:last, seen] = allowed & shape.triu(offset - window + 1) if window else allowed
        blocks = visible.view(rows, bounds[-1] // rows, rows, -1)
        return torch.stack([blocks[row, :, row] for row in range(rows)])[:, None]


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    keys: Keys | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula with a mask over all T x T pairs, in float32 at least, differentiable."""
    dtype = dispatch.compute_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide_k, wide_v = (t.to(dtype).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), wide_k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    document, left = _from_the_end(cu_seqlens, q)
    key_document, key_left = _from_the_end(cu_seqlens if keys is None else keys.cu_seqlens, k)
    gap = key_left[None, :] - left[:, None]
    visible = (document[:, None] == key_document[None, :]) & (gap >= 0)
    if window:
        visible &= gap < window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, q.shape[0], 1)], dim=2)
    p = torch.softmax(scores, dim=2)[:, :, : k.shape[0]]
    return torch.einsum("hij,jhd->ihd", p, wide_v).to(q.dtype)


def _from_the_end(cu_seqlens: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of ``x`` its document, and how many rows of that follow it."""
    ends, position = cu_seqlens[1:].long().contiguous(), torch.arange(x.shape[0], device=x.device)
    document = torch.searchsorted(ends, position, right=True)
    return document, ends[document] - 1 - position


def choose_backend(q: torch.Tensor, *, window: int = 0, softcap: float = 0.0, sinks: bool = False) -> str:
    """The implementation for this device, dtype, head dimension and mask.

    Args:
        q: (T, H, D) queries; only device, dtype and shape are looked at.
        window: As for :func:`varlen_attention`.
        softcap: Likewise.
        sinks: Whether there are sinks.
    """
    plain = not (window or softcap or sinks)
    if not q.is_cuda:
        return "sdpa" if plain and q.dtype != torch.float64 else "reference"
    flash_fits = q.dtype in _HALF and q.shape[2] <= 256 and q.shape[2] % 8 == 0
    if flash_fits and dispatch.capability(q.device) >= (8, 0):
        if not sinks and has_flash_attn():
            return "flash_attn"
        takes = torch_varlen_parameters()
        if not (softcap or sinks) and takes and (not window or "window_size" in takes):
            return "torch"
    if plain:
        return "sdpa"
    return "flex" if q.dtype in dispatch.FLOAT_DTYPES else "reference"


@cache
def has_flash_attn() -> bool:
    """Whether the flash_attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


@cache
def torch_varlen_parameters() -> frozenset[str]:
    """Parameters of torch's own packed attention; empty where torch has none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash_attn(q, k, v, bounds, scale, window, softcap):
    from flash_attn import flash_attn_varlen_func

    size = (window - 1, 0) if window else (-1, -1)
    return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=size, softcap=softcap)


def _torch_varlen(q, k, v, bounds, scale, window):
    from torch.nn.attention.varlen import varlen_attn

    takes = torch_varlen_parameters()
    kwargs: dict[str, object] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in takes:
            kwargs["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if "window_size" in takes:
        kwargs["window_size"] = (window - 1 if window else -1, 0)
    else:
        kwargs["is_causal"] = True
    if "scale" in takes:
        kwargs["scale"] = scale
    else:  # scaled by D ** -0.5 inside
        q = q * (scale * q.shape[2] ** 0.5)
    return varlen_attn(q, k, v, *bounds, **kwargs)


def _sdpa(q, k, v, cu, cu_keys, scale):
    bounds, key_bounds = cu.tolist(), cu_keys.tolist()
    parts = []
    for i, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if first == last:
            continue
        its_keys = slice(key_bounds[i], key_bounds[i + 1])
        queries, keys, values = (t[None].transpose(1, 2) for t in (q[first:last], k[its_keys], v[its_keys]))
        count, key_count = last - first, its_keys.stop - its_keys.start
        visible = None
        if count != key_count:
            visible = torch.ones(count, key_count, dtype=torch.bool, device=q.device).tril(key_count - count)
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=grouped
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@cache
def _compiled_flex():
    """Flex attention, compiled once a process; sizes become dynamic when they first change.

    Not ``dynamic=True``: that makes the soft cap's number an input, which flex attention's gradient refuses.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q, k, v, cu, scale, window, softcap, sinks):
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = q.shape[0]
    position = torch.arange(tokens, device=q.device)
    document = torch.searchsorted(cu[1:].long().contiguous(), position, right=True)

    def visible(_b, _h, i, j):
        inside = (document[i] == document[j]) & (i >= j)
        return inside & (i - j < window) if window else inside

    def capped(score, _b, _h, _i, _j):
        return softcap * torch.tanh(score / softcap)

    mask = create_block_mask(visible, None, None, tokens, tokens, device=q.device)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    out, lse = _compiled_flex()(
        *heads,
        score_mod=capped if softcap else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True,
    )
    if sinks is not None:
        out = (out * torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])[..., None]).to(q.dtype)
    return out[0].transpose(0, 1)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    keys: Keys | None = None,
    longest: int | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str | None = None,
    fast: bool = True,
) -> torch.Tensor:
    """Causal attention within each packed document, differentiable.

    Args:
        q: (T, H, D).
        k: (T, K, D), or as many rows as ``keys`` says; K divides H.
        v: Likewise.
        cu_seqlens: (B + 1,) int32, from 0 to T.
        keys: Where the keys of documents are that have more of them than queries; None: where the queries are.
        longest: Tokens of the longest document, or more; None to ask the device and wait for it.
        scale: Of the scores; None for D ** -0.5.
        window: How many of the newest tokens a query sees, itself included; 0 for all.
        softcap: Bound of the scores; 0 for none.
        sinks: (H,) logits that take part in the softmax without a value, or None.
        backend: One of ``BACKENDS``; None for :func:`choose_backend`'s choice.
        fast: False for the reference.

    Returns:
        (T, H, D).
    """
    _check_shapes(q, k, v, cu_seqlens, keys)
    _check(q, window, softcap, sinks, backend, keys)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not fast or not q.shape[0]:
        backend = "reference"
    elif backend is None:
        backend = choose_backend(q, window=window, softcap=softcap, sinks=sinks is not None)
    if backend == "reference":
        return varlen_attention_reference(
            q, k, v, cu_seqlens, keys=keys, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    if backend == "flex":
        return _flex(q, k, v, cu_seqlens, scale, window, softcap, sinks)
    cu = cu_seqlens.to(torch.int32)
    if backend == "sdpa":
        return _sdpa(q, k, v, cu, cu if keys is None else keys.cu_seqlens, scale)
    longest = int(cu.diff().max()) if longest is None else longest
    bounds = (cu, cu, longest, longest) if keys is None else (cu, keys.cu_seqlens, longest, keys.longest)
    if backend == "flash_attn":
        return _flash_attn(q, k, v, bounds, scale, window, softcap)
    return _torch_varlen(q, k, v, bounds, scale, window)


def _check_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, keys: Keys | None
) -> None:
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and k.shape[2] == q.shape[2]
    if not fits or (keys is None and len(k) != len(q)) or q.shape[1] % k.shape[1]:
        raise ConfigError(
            "Queries, keys and values do not fit",
            got=(tuple(q.shape), tuple(k.shape), tuple(v.shape)),
            do="Pass (T, H, D), (T, K, D) and (T, K, D) with K dividing H.",
        )
    if len({(t.dtype, t.device) for t in (q, k, v)}) > 1:
        raise ConfigError(
            "Queries, keys and values differ in dtype or device",
            got=[(t.dtype, t.device) for t in (q, k, v)],
            do="Cast or move them.",
        )
    dispatch.check_tensors("varlen_attention", q=q, k=k, v=v)
    dispatch.check_device("varlen_attention", q.device, cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            "cu_seqlens must hold integers",
            got=(cu_seqlens.dtype, tuple(cu_seqlens.shape)),
            do="Pass (B + 1,) int32, from 0 to the number of tokens.",
        )
    if cu_seqlens.device.type == "cpu" and (not len(cu_seqlens) or cu_seqlens[0] != 0 or cu_seqlens[-1] != len(q)):
        got = cu_seqlens.tolist()
        raise ConfigError("cu_seqlens does not cover the tokens", got=got, do=f"Begin with 0 and end with {len(q)}.")
    if keys is not None and keys.cu_seqlens.shape != cu_seqlens.shape:
        raise ConfigError("Queries and keys are of different documents", got=(len(cu_seqlens), len(keys.cu_seqlens)))


def _check(
    q: torch.Tensor,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    backend: str | None,
    keys: Keys | None,
) -> None:
    dispatch.check_tensors("varlen_attention", q=q, sinks=sinks)
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ConfigError("One sink a query head is needed", got=tuple(sinks.shape), do=f"Pass ({q.shape[1]},).")
    if window < 0 or softcap < 0:
        raise ConfigError("Window and softcap must not be negative", got=(window, softcap), do="Use 0 for none.")
    if backend is not None and backend not in BACKENDS:
        raise ConfigError("Unknown attention backend", got=backend, do=f"Use one of {BACKENDS}.")
    no_sinks = sinks is not None and backend in ("flash_attn", "torch", "sdpa")
    no_cap = softcap and backend in ("torch", "sdpa")
    no_keys = keys is not None and backend == "flex"
    if no_sinks or no_cap or no_keys or (window and backend == "sdpa"):
        raise ConfigError(
            "This attention backend lacks what was asked of it",
            got=(backend, f"window={window}", f"softcap={softcap}", f"sinks={sinks is not None}"),
            do="Leave backend out, or use flex.",
        )
