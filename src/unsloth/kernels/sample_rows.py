"""A token for every row of logits, with its log-probabilities, in one pass over them.

With raw logits r, adjusted ones a (penalties, biases; often r itself), temperature T, a lower bound c and numbers u_v
in (0, 1] that are a hash of the row's two keys and the column::

    z_v    = a_v / T if a_v / T >= c else -inf                    (T = 0: z = a, and nothing is left out)
    token  = argmax_v z_v - log(-log(1 - u_v))                    (T = 0: argmax_v z_v)
    sampled = z_token - logsumexp(z)                              (T = 0: 0)
    model   = r_token - logsumexp(r)

The argmax is distributed as softmax(z) (the Gumbel-max trick, or exponential race; Maddison et al. 2014,
arXiv:1411.0030), needs no order of the columns, and does not depend on how they are shared among programs. Bytes: the
logits once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.approximate import exponential, logarithm, reciprocal
from unsloth.kernels.dispatch import can_launch, check_device, check_shape, check_tensors, interpreting, launch_on
from unsloth.kernels.row_norm import add_two

CHUNK = 4096
_MASK = 0xFFFFFFFF
_SMALL = 2.0**-8  # below, -log(1 - u) would lose the digits of u, whose smallest values win


def sample_rows(
    raw: torch.Tensor,
    adjusted: torch.Tensor,
    temperature: torch.Tensor,
    bound: torch.Tensor | None,
    keys: torch.Tensor,
    *,
    fast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a token for every row.

    Args:
        raw: (B, V), adjacent columns.
        adjusted: Like ``raw``, of any float dtype.
        temperature: (B,) float32.
        bound: (B,) float32, on the scale of ``adjusted * (1 / temperature)``; None for none.
        keys: (2, B) int32.
        fast: False takes the plain-torch reference.

    Returns:
        (token int64, sampled float32, model float32), each (B,).
    """
    check_tensors("sample_rows", raw=raw, adjusted=adjusted, temperature=temperature, bound=bound)
    check_device("sample_rows", raw.device, keys=keys)
    if raw.dim() != 2 or not raw.shape[1] or keys.dtype != torch.int32:
        got = (tuple(raw.shape), keys.dtype)
        raise ConfigError("sample_rows: wrong logits or keys", got=got, do="Pass logits (B, V) and int32 keys (2, B).")
    rows, size = raw.shape
    check_shape("sample_rows", "bound", bound, (rows,))
    if adjusted.shape != raw.shape or temperature.shape != (rows,) or keys.shape != (2, rows):
        shapes = (tuple(raw.shape), tuple(adjusted.shape), tuple(temperature.shape), tuple(keys.shape))
        raise ConfigError("sample_rows: shapes do not fit", got=shapes, do="Pass (B, V), (B, V), (B,) and (2, B).")
    adjacent = raw.stride(1) == 1 and adjusted.stride(1) == 1
    if not (fast and adjacent and rows and can_launch(raw, adjusted, temperature)):
        return sample_rows_reference(raw, adjusted, temperature, bound, keys)
    temperature, keys = temperature.contiguous(), keys.contiguous()
    bound = None if bound is None else bound.contiguous()
    chunks = triton.cdiv(size, CHUNK)
    parts = torch.empty(7, rows, chunks, dtype=torch.float32, device=raw.device)
    places = torch.empty(rows, chunks, dtype=torch.int32, device=raw.device)
    token = torch.empty(rows, dtype=torch.int64, device=raw.device)
    sampled, model = torch.empty(2, rows, dtype=torch.float32, device=raw.device)
    with launch_on(raw):
        sample_chunks_kernel[(rows, chunks)](
            raw, adjusted, temperature, bound, keys, parts, places, size, raw.stride(0), adjusted.stride(0),
            keys.stride(0), BOUND=bound is not None, INTERPRET=interpreting(), CHUNK=CHUNK,
            num_warps=4,
        )  # fmt: skip
        join_chunks_kernel[(rows,)](
            temperature, parts, places, token, sampled, model, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1
        )
    return token, sampled, model


def sample_rows_reference(
    raw: torch.Tensor,
    adjusted: torch.Tensor,
    temperature: torch.Tensor,
    bound: torch.Tensor | None,
    keys: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula in plain torch."""
    greedy = temperature == 0
    z = adjusted.float() * (1 / torch.where(greedy, 1.0, temperature))[:, None]
    if bound is not None:
        z = z.masked_fill((z < bound[:, None]) & ~greedy[:, None], float("-inf"))
    token = torch.where(greedy, z.argmax(-1), (z - waiting_times(keys, z.shape[1]).log()).argmax(-1))
    sampled = (z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)).masked_fill(greedy, 0.0)
    values = raw.float()
    return token, sampled, values.gather(1, token[:, None])[:, 0] - values.logsumexp(-1)


def waiting_times(keys: torch.Tensor, size: int) -> torch.Tensor:
    """(B, size) float32, -log(1 - u): exponentially distributed, a function of row keys (2, B) and column alone."""
    column = torch.arange(size, device=keys.device)
    first, second = (key.long()[:, None] & _MASK for key in keys)
    bits = _mix((column * 0x9E3779B1 + first) & _MASK)
    u = (_mix(bits ^ second).float() + 1) * 2.0**-32
    return torch.where(u < _SMALL, u * (1 + u * (0.5 + u / 3)), -torch.log(1 - u.clamp(max=1 - 2.0**-24)))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers that spreads every bit over all (the finalizer of MurmurHash3)."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)


@triton.jit
def mix(bits):
    """See :func:`_mix`; ``bits`` is uint32."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def two_tops(a0, b0, a1, b1):
    """Largest of two pairs."""
    return tl.maximum(a0, a1), tl.maximum(b0, b1)


@triton.jit(do_not_specialize=["keys_stride"])  # which is the number of rows
def sample_chunks_kernel(
    raw, adjusted, temperature, bound, keys, parts, places, size, raw_stride, adjusted_stride, keys_stride,
    BOUND: tl.constexpr, INTERPRET: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program takes CHUNK columns of a row; its threads exchange what they have three times.

    The race is run as exp(z - largest z) / -log(1 - u), which is monotonic in that of the formula and spares a
    logarithm.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    rows, chunks = tl.num_programs(0), tl.num_programs(1)
    heat = tl.load(temperature + row)
    greedy = heat == 0.0
    cold = 1.0 / tl.where(greedy, 1.0, heat)
    first = tl.load(keys + row).to(tl.uint32)
    second = tl.load(keys + keys_stride + row).to(tl.uint32)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < size
    r = tl.load(raw + row * raw_stride + column, inside, other=float("-inf")).to(tl.float32)
    z = tl.load(adjusted + row * adjusted_stride + column, inside, other=float("-inf")).to(tl.float32) * cold
    if BOUND:
        lowest = tl.where(greedy, float("-inf"), tl.load(bound + row))
        z = tl.where(z < lowest, float("-inf"), z)
    raw_top, top = tl.reduce((r, z), 0, two_tops)
    safe = tl.where(top == float("-inf"), 0.0, top)
    e = exponential(z - safe, INTERPRET)
    raw_e = exponential(r - tl.where(raw_top == float("-inf"), 0.0, raw_top), INTERPRET)
    raw_sum, total = tl.reduce((raw_e, e), 0, add_two)
    bits = mix(mix(column.to(tl.uint32) * 0x9E3779B1 + first) ^ second)
    u = (bits.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    early = u * (1.0 + u * (0.5 + u * (0.33333333 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    wait = tl.where(u < 0.0625, early, -logarithm(1.0 - tl.minimum(u, 0.99999994), INTERPRET))
    race = tl.where(greedy, z, e * reciprocal(wait, INTERPRET))
    winner, at = tl.max(tl.where(inside, race, float("-inf")), 0, return_indices=True)
    place = chunk * CHUNK + at
    out = parts + row * chunks + chunk
    plane = rows * chunks
    tl.store(out, raw_top)
    tl.store(out + plane, raw_sum)
    tl.store(out + 2 * plane, top)
    tl.store(out + 3 * plane, total)
    tl.store(out + 4 * plane, tl.where(greedy, winner, tl.log(winner) + top))
    tl.store(out + 5 * plane, tl.load(adjusted + row * adjusted_stride + place).to(tl.float32) * cold)
    tl.store(out + 6 * plane, tl.load(raw + row * raw_stride + place).to(tl.float32))
    tl.store(places + row * chunks + chunk, place)


@triton.jit
def join_chunks_kernel(temperature, parts, places, token, sampled, model, chunks, BLOCK: tl.constexpr):
    """One program a row: the winner among its chunks, and the sums of all of them."""
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0) * chunks
    c = tl.arange(0, BLOCK)
    inside = c < chunks
    at = parts + row * chunks + c
    raw_top = tl.load(at, inside, other=float("-inf"))
    raw_sum = tl.load(at + plane, inside, other=0.0)
    top = tl.load(at + 2 * plane, inside, other=float("-inf"))
    total = tl.load(at + 3 * plane, inside, other=0.0)
    best = tl.load(at + 4 * plane, inside, other=float("-inf"))
    chosen = c == tl.argmax(best, 0)
    best_z = tl.max(tl.where(chosen, tl.load(at + 5 * plane, inside, other=float("-inf")), float("-inf")), 0)
    best_raw = tl.max(tl.where(chosen, tl.load(at + 6 * plane, inside, other=float("-inf")), float("-inf")), 0)
    place = tl.sum(tl.where(chosen, tl.load(places + row * chunks + c, inside, other=0), 0), 0)
    raw_most, most = tl.max(raw_top, 0), tl.max(top, 0)
    raw_all = raw_most + tl.log(tl.sum(raw_sum * tl.exp(raw_top - raw_most), 0))
    everything = most + tl.log(tl.sum(tl.where(total > 0.0, total * tl.exp(top - most), 0.0), 0))
    heat = tl.load(temperature + row)
    tl.store(token + row, place.to(tl.int64))
    tl.store(sampled + row, tl.where(heat == 0.0, 0.0, best_z - everything))
    tl.store(model + row, best_raw - raw_all)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    numbers = dict.fromkeys(("size", "raw_stride", "adjusted_stride", "keys_stride"), "i32")
    floats = dict.fromkeys(("temperature", "bound", "parts"), "*fp32")
    first = {"raw": f"*{float_dtype}", "adjusted": f"*{float_dtype}", "keys": "*i32", "places": "*i32"}
    second = dict.fromkeys(("temperature", "parts", "sampled", "model"), "*fp32")
    second |= {"places": "*i32", "token": "*i64", "chunks": "i32"}
    shape = {"BOUND": True, "INTERPRET": False, "CHUNK": CHUNK}
    return [
        (sample_chunks_kernel, first | floats | numbers, shape, {"num_warps": 4}),
        (join_chunks_kernel, second, {"BLOCK": 32}, {"num_warps": 1}),
    ]
