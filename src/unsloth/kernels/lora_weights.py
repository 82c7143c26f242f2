"""Frozen weights with low-rank adapters beside them, in the two forms that the LoRA ops multiply with.

Shapes: K input features, O output features summed over the linears of a group (one, or q/k/v, or gate/up), r the rank
of one adapter, R the group's ranks summed (rounded up to 16 in the padded form). In the padded form the weight lies in
the corner of a larger buffer::

    buffer = [ W    sB ]   O rows          W (O, K): the group's weights, stacked
             [ A    .  ]   R rows         sB (O, R): block-diagonal, scaled;  A (R, K): stacked

so that both directions are one matrix product each, with no pass over the output to add the adapters' part::

    y  = [x | x A^T] [W | sB]^T            dx = [g | g sB] [W ; A]

A bfloat16 model keeps its weights in such buffers for good (1 to 2% more memory); a quantized one dequantizes into a
shared one. Where a weight is a plain tensor, the adapters' part is accumulated into the output instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.head_chunks import matmul_into
from unsloth.kernels.rounding import must_round, nearest

_RANK_STEP = 16


@dataclass(frozen=True)
class Adapter:
    """A low-rank pair: the linear's output gains ``scale * (x @ a.T) @ b.T``.

    Attributes:
        a: (r, K), usually float32 masters.
        b: (out, r).
        scale: ``lora_alpha / r``, or what else the adapter's configuration makes of it.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of ``a``."""
        return self.a.shape[0]


@dataclass
class PaddedWeight:
    """Weights of a group of linears in the corner of a buffer with room for their adapters.

    Attributes:
        buffer: (O + room, K + room), unit stride along K; everything outside the weights is overwritten.
        outs: Output features of each linear, in the order of its rows.
        room: Rows and columns beyond the weights.
        placed: What :meth:`place` last wrote.
    """

    buffer: torch.Tensor
    outs: tuple[int, ...]
    room: int
    placed: tuple = field(default=(), repr=False)

    @classmethod
    def empty(
        cls, outs: Sequence[int], in_features: int, rank: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> PaddedWeight:
        """A buffer for adapters of ``rank`` in all; fill ``weight`` (or ``parts()``) before use."""
        room = padded_rank(rank)
        buffer = torch.empty(sum(outs) + room, in_features + room, dtype=dtype, device=device)
        return cls(buffer, tuple(outs), room)

    @classmethod
    def from_dense(cls, weights: Sequence[torch.Tensor], rank: int) -> PaddedWeight:
        """A copy of (out_i, K) weights, stacked."""
        first = weights[0]
        kinds = {(weight.dim(), weight.shape[1:], weight.dtype, weight.device) for weight in weights}
        if first.dim() != 2 or len(kinds) > 1:
            got = [(tuple(weight.shape), weight.dtype, str(weight.device)) for weight in weights]
            do = "Pass matrices (out, K) of one dtype on one device."
            raise ConfigError("Weights of one input do not fit together", got=got, do=do)
        outs = [weight.shape[0] for weight in weights]
        padded = cls.empty(outs, first.shape[1], rank, dtype=first.dtype, device=first.device)
        for part, weight in zip(padded.parts(), weights, strict=True):
            part.copy_(weight.detach())
        return padded

    @property
    def out_features(self) -> int:
        """O."""
        return self.buffer.shape[0] - self.room

    @property
    def in_features(self) -> int:
        """K."""
        return self.buffer.shape[1] - self.room

    @property
    def weight(self) -> torch.Tensor:
        """(O, K) view of the weights."""
        return self.buffer[: self.out_features, : self.in_features]

    def parts(self) -> list[torch.Tensor]:
        """(out_i, K) views, one a linear."""
        return list(self.weight.split(self.outs))

    def place(self, adapters: Sequence[Adapter | None], rank: int, *, again: bool = True) -> None:
        """Write ``sB`` and ``A`` of all adapters (``rank`` rows and columns).

        With ``again=False`` not if these very tensors are there already, as far as torch's version counters know.
        They do not know of writes through ``.data`` or raw pointers, such as some optimizers', so a forward writes
        always, and only the backward, which no optimizer's step separates from its forward, asks.
        """
        if rank > self.room:
            raise ConfigError(
                "The padded weight has too little room for its adapters",
                got=f"room {self.room}, ranks {[0 if a is None else a.rank for a in adapters]}",
                do="Build it with the ranks' sum.",
            )
        if not again and _same(self.placed, adapters):
            return
        row = first = 0
        slots = []
        for i, (out, adapter) in enumerate(zip(self.outs, adapters, strict=True)):
            last = rank if i + 1 == len(self.outs) else first + (0 if adapter is None else adapter.rank)
            slot = _slot(self, adapter, slice(row, row + out), slice(first, last), rank)
            if slot is not None:
                slots.append(slot)
            row, first = row + out, last
        for i in range(0, len(slots), 3):
            _launch_slots(self, slots[i : i + 3], rank)
        self.placed = tuple(None if adapter is None else _identity(adapter) for adapter in adapters)


Weight: TypeAlias = torch.Tensor | PaddedWeight | Callable[[], torch.Tensor | PaddedWeight]


def padded_rank(rank: int) -> int:
    """Ranks rounded up so that rows of the buffers stay 32-byte aligned."""
    return -(-rank // _RANK_STEP) * _RANK_STEP


def _identity(adapter: Adapter) -> tuple[tuple, tuple]:
    """(weak references to A and B, what else must be equal for their values to be the same)."""
    pair = (adapter.a, adapter.b)
    versions = tuple(-1 if t.is_inference() else t._version for t in pair)
    return tuple(weakref.ref(t) for t in pair), (*(t.data_ptr() for t in pair), *versions, adapter.scale)


def _same(placed: tuple, adapters: Sequence[Adapter | None]) -> bool:
    return len(placed) == len(adapters) and all(map(_same_adapter, placed, adapters))


def _same_adapter(old: tuple[tuple, tuple] | None, new: Adapter | None) -> bool:
    if old is None or new is None:
        return old is None and new is None
    (old_a, old_b), values = old  # references are compared by identity: == would compare the tensors' elements
    return old_a() is new.a and old_b() is new.b and -1 not in values[2:4] and values == _identity(new)[1]


@triton.jit
def place_adapter(
    pid, a_ptr, b_ptr, buffer_ptr, stride, row0, out, rank0, rank, rank_end, columns, features, total, a_stride,
    b_stride, scale, ROUND: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first programs write a block of rows of sB, the others a piece of one row of A; zeros where neither is."""
    b_programs = tl.cdiv(out, BLOCK_O)
    if pid < b_programs:
        o = pid * BLOCK_O + tl.arange(0, BLOCK_O)
        c = tl.arange(0, BLOCK_R)
        mine = (o[:, None] < out) & (c[None, :] >= rank0) & (c[None, :] < rank0 + rank)
        b = tl.load(b_ptr + o[:, None].to(tl.int64) * b_stride + (c[None, :] - rank0), mask=mine, other=0.0)
        at_b = buffer_ptr + (row0 + o[:, None]).to(tl.int64) * stride + features + c[None, :]
        tl.store(at_b, nearest(b.to(tl.float32) * scale, ROUND), mask=(o[:, None] < out) & (c[None, :] < columns))
    else:
        blocks = tl.cdiv(features, BLOCK_K)
        k = (pid - b_programs) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        r = (pid - b_programs) // blocks + tl.zeros([BLOCK_K], tl.int32)
        a = tl.load(a_ptr + r.to(tl.int64) * a_stride + k, mask=(k < features) & (r < rank), other=0.0)
        at_a = buffer_ptr + (total + rank0 + r).to(tl.int64) * stride + k
        tl.store(at_a, nearest(a.to(tl.float32), ROUND), mask=(k < features) & (rank0 + r < rank_end))


@triton.jit
def place_adapters_kernel(
    a0, b0, row0, out0, first0, rank0, end0, a0_stride, b0_stride, scale0,
    a1, b1, row1, out1, first1, rank1, end1, a1_stride, b1_stride, scale1,
    a2, b2, row2, out2, first2, rank2, end2, a2_stride, b2_stride, scale2,
    buffer, stride, columns, features, total,
    EARLY: tl.constexpr, ROUND: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adapters of up to three linears, the grid's second number saying which."""
    if EARLY:
        gdc_wait()
    pid, which = tl.program_id(0), tl.program_id(1)
    if which == 0:
        place_adapter(
            pid, a0, b0, buffer, stride, row0, out0, first0, rank0, end0, columns, features, total, a0_stride,
            b0_stride, scale0, ROUND, BLOCK_O, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    elif which == 1:
        place_adapter(
            pid, a1, b1, buffer, stride, row1, out1, first1, rank1, end1, columns, features, total, a1_stride,
            b1_stride, scale1, ROUND, BLOCK_O, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        place_adapter(
            pid, a2, b2, buffer, stride, row2, out2, first2, rank2, end2, columns, features, total, a2_stride,
            b2_stride, scale2, ROUND, BLOCK_O, BLOCK_R, BLOCK_K,
        )  # fmt: skip


def _slot(padded: PaddedWeight, adapter: Adapter | None, rows: slice, ranks: slice, columns: int) -> tuple | None:
    """The kernel's arguments for one linear; None where torch has written its share already.

    That share is rows of sB over all ``columns``, and its rows of A up to ``ranks.stop``.
    """
    buffer, in_features, total = padded.buffer, padded.in_features, padded.out_features
    if adapter is None or not dispatch.can_launch(buffer, adapter.a, adapter.b):
        buffer[rows, in_features : in_features + columns] = 0
        buffer[total + ranks.start : total + ranks.stop, :in_features] = 0
        if adapter is not None:
            first = in_features + ranks.start
            buffer[rows, first : first + adapter.rank] = (adapter.b.detach() * adapter.scale).to(buffer.dtype)
            first = total + ranks.start
            buffer[first : first + adapter.rank, :in_features] = adapter.a.detach().to(buffer.dtype)
        return None
    a, b = adapter.a.detach(), adapter.b.detach()
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    sizes = (rows.start, rows.stop - rows.start, ranks.start, adapter.rank, ranks.stop)
    return a, b, *sizes, a.stride(0), b.stride(0), adapter.scale


def _launch_slots(padded: PaddedWeight, slots: Sequence[tuple], columns: int) -> None:
    """One launch for one to three linears."""
    block_o, block_k = 32, 1024
    pieces = triton.cdiv(padded.in_features, block_k)
    programs = max(triton.cdiv(slot[3], block_o) + (slot[6] - slot[4]) * pieces for slot in slots)
    early = dispatch.overlaps_launches(padded.buffer.device)
    three = [*slots, *[slots[0]] * (3 - len(slots))]
    with dispatch.launch_on(padded.buffer):
        place_adapters_kernel[(programs, len(slots))](
            *three[0], *three[1], *three[2], padded.buffer, padded.buffer.stride(0), columns, padded.in_features,
            padded.out_features, EARLY=early, ROUND=must_round(padded.buffer.dtype), BLOCK_O=block_o,
            BLOCK_R=triton.next_power_of_2(columns), BLOCK_K=block_k, **dispatch.early_launch(early),
        )  # fmt: skip


class LoraGroup:
    """Linears of one input with their adapters, ready to multiply: the weights at hand, ``A`` and ``sB`` cast.

    Attributes:
        outs: Output features of each linear.
        ranks: Rank of each adapter, 0 for none.
        room: Columns that inputs of :meth:`forward` and gradients of :meth:`input_gradient` carry behind their
            features, filled with the projections; 0 in the plain form.
        columns: Width of the projections, at least the ranks' sum.
        a: (columns, K) stacked ``A``.
    """

    def __init__(
        self, weights: Sequence[Weight], adapters: Sequence[Adapter | None], dtype: torch.dtype, *, again: bool = True
    ) -> None:
        self.adapters = list(adapters)
        self.ranks = [0 if adapter is None else adapter.rank for adapter in adapters]
        got = [weight() if callable(weight) else weight for weight in weights]
        for weight in got:
            found = (weight.buffer if isinstance(weight, PaddedWeight) else weight).dtype
            if found != dtype:
                raise ConfigError(
                    "Weight and input differ in dtype", got=(found, dtype), do="Cast the input, or use autocast."
                )
        self.padded = got[0] if isinstance(got[0], PaddedWeight) else None
        if self.padded is not None:
            self._use_padded(self.padded)
        else:
            self._use_plain([weight for weight in got if isinstance(weight, torch.Tensor)], dtype)
        if len(self.outs) != len(self.adapters):
            raise ConfigError(
                "Every linear needs an adapter or None", got=(self.outs, len(self.adapters)), do="Pass one a linear."
            )
        self._check_adapters()
        self._out_slices, self._rank_slices = _slices(self.outs), _slices(self.ranks)
        if self.padded is not None:
            self.padded.place(self.adapters, self.room, again=again)

    def refreshed(self) -> LoraGroup:
        """This group, with its adapters in the padded weight again should another group's be there by now."""
        if self.padded is not None:
            self.padded.place(self.adapters, self.room, again=False)
        return self

    def _use_padded(self, padded: PaddedWeight) -> None:
        self.outs, self.in_features = padded.outs, padded.in_features
        self.room = self.columns = padded_rank(sum(self.ranks))
        total = padded.out_features
        self.a = padded.buffer[total : total + self.columns, : self.in_features]

    def _use_plain(self, weights: list[torch.Tensor], dtype: torch.dtype) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.outs, self.in_features = tuple(w.shape[0] for w in weights), weights[0].shape[1]
        self.room, self.columns = 0, sum(self.ranks)
        parts = [adapter.a.detach().to(dtype) for adapter in self.adapters if adapter is not None]
        self.a = torch.cat(parts) if parts else weights[0].new_empty(0, self.in_features)

    def _check_adapters(self) -> None:
        for out, adapter in zip(self.outs, self.adapters, strict=True):
            if adapter is None:
                continue
            rank = adapter.a.shape[0]
            if adapter.a.shape != (rank, self.in_features) or adapter.b.shape != (out, rank):
                raise ConfigError(
                    "An adapter does not fit its weight",
                    got=f"A {tuple(adapter.a.shape)}, B {tuple(adapter.b.shape)}, weight {(out, self.in_features)}",
                    do="Pass A of shape (r, in) and B of shape (out, r).",
                )

    def out_slices(self) -> list[slice]:
        """Columns of each linear in the stacked output."""
        return self._out_slices

    def rank_slices(self) -> list[slice]:
        """Columns of each adapter in the projections."""
        return self._rank_slices

    def sb(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        """(out_i, r_i) scaled ``B`` of linear ``i``."""
        if self.padded is not None:
            first = self.in_features + self.rank_slices()[i].start
            return self.padded.buffer[self.out_slices()[i], first : first + self.ranks[i]]
        adapter = self.adapters[i]
        assert adapter is not None
        return (adapter.b.detach() * adapter.scale).to(dtype)

    def stacked_sb(self) -> torch.Tensor:
        """(O, columns) block-diagonal scaled ``B``, in the padded form."""
        assert self.padded is not None
        return self.padded.buffer[: self.padded.out_features, self.in_features : self.in_features + self.columns]

    def forward(
        self,
        x: torch.Tensor,
        projected: torch.Tensor,
        biases: Sequence[torch.Tensor | None],
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stacked outputs (M, O) of ``x`` (M, K + room) and ``projected`` = x A^T (M, columns); written to ``out``."""
        if self.padded is not None:
            weight = self.padded.buffer[: self.padded.out_features, : self.in_features + self.room].t()
            if all(bias is None for bias in biases):
                return torch.mm(x, weight, out=out)
            stacked = [
                torch.zeros(size, dtype=x.dtype, device=x.device) if bias is None else bias.to(x.dtype)
                for size, bias in zip(self.outs, biases, strict=True)
            ]
            return torch.addmm(torch.cat(stacked) if len(stacked) > 1 else stacked[0], x, weight, out=out)
        y = torch.empty(x.shape[0], sum(self.outs), dtype=x.dtype, device=x.device) if out is None else out
        for i, (columns, ranks) in enumerate(zip(self.out_slices(), self.rank_slices(), strict=True)):
            bias, part = biases[i], y[:, columns]
            if bias is None:
                torch.mm(x, self.weights[i].t(), out=part)
            else:
                torch.addmm(bias.to(x.dtype), x, self.weights[i].t(), out=part)
            if self.ranks[i]:
                part.addmm_(projected[:, ranks], self.sb(i, x.dtype).t())
        return y

    def add_forward(
        self, residual: torch.Tensor, x: torch.Tensor, projected: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        """Into ``out``, :meth:`forward` of a group of one linear plus ``residual`` (M, O), rounded as one sum.

        Without adapters both may be float32, where ``x`` is not.
        """
        if residual.dtype != x.dtype:
            matmul_into(out.copy_(residual), x, self.weights[0].t(), accumulate=True)
            return out
        if self.padded is not None:
            weight = self.padded.buffer[: self.padded.out_features, : self.in_features + self.room].t()
            return torch.addmm(residual, x, weight, out=out)
        y = torch.addmm(residual, x, self.weights[0].t(), out=out)
        return y.addmm_(projected, self.sb(0, x.dtype).t()) if self.columns else y

    def input_gradient_of_wide(
        self, g: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient (M, K), g sB (M, columns)) of all gradients ``g`` (M, O) side by side, in the padded form.

        The thin product takes columns of the wide one, ``g [W | sB]``, and its product with A is added: for gradients
        several times as wide as the input, which a pass of their own would read once more. Both lie in ``out``
        (M, K + room).
        """
        assert self.padded is not None
        out = g.new_empty(g.shape[0], self.in_features + self.room) if out is None else out
        torch.mm(g, self.padded.buffer[: self.padded.out_features, : self.in_features + self.room], out=out)
        dx, projected = out[:, : self.in_features], out[:, self.in_features :]
        # Not from columns of a wider buffer on a CPU: oneDNN may read a row beyond its end (see HeadChunks.gradient).
        return dx.addmm_(projected if g.is_cuda else projected.contiguous(), self.a), projected

    def input_gradient(
        self, grads: Sequence[torch.Tensor], projected: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(M, K) gradient; ``grads`` is one (M, O + room) in the padded form, one (M, out_i) a linear in the plain one.

        ``projected`` is g sB (M, columns); written to ``out`` if given.
        """
        if self.padded is not None:
            rows = self.padded.out_features + self.room
            return torch.mm(grads[0], self.padded.buffer[:rows, : self.in_features], out=out)
        dx = torch.mm(grads[0], self.weights[0], out=out)
        for g, weight in zip(grads[1:], self.weights[1:], strict=True):
            dx.addmm_(g, weight)
        if self.columns:
            dx.addmm_(projected, self.a)
        return dx


def _slices(sizes: Sequence[int]) -> list[slice]:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def compile_examples(float_dtype: str) -> list[tuple]:
    """Signatures for the cross-compilation test."""
    shape = {"EARLY": False, "ROUND": False, "BLOCK_O": 32, "BLOCK_R": 128, "BLOCK_K": 1024}
    names = [name for name in place_adapters_kernel.arg_names if name not in shape]
    signature = dict.fromkeys(names, "i32") | {f"scale{i}": "fp32" for i in range(3)}
    signature |= {f"{name}{i}": "*fp32" for i in range(3) for name in "ab"} | {"buffer": f"*{float_dtype}"}
    return [(place_adapters_kernel, signature, shape)]
