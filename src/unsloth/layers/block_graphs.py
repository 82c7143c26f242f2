"""Forward and backward of blocks as recorded CUDA graphs: one launch in the place of sixty.

A block of 4,096 tokens keeps an H100 busy for 3 ms forward and 7 ms backward, hardly longer than Python needs to launch
its kernels; smaller ones wait for Python. Where batches of one shape come again and again, and values are not kept but
computed again, the launches of each block are recorded at the third such batch and replayed from then on.

All graphs of one shape share one set of buffers for what goes in and out, and those of all shapes one pool of memory,
since they run one after the other. A replay reads weights and adapters where they were when it was recorded; whether
they still are there is asked at each call. What is computed is what :mod:`unsloth.layers.block_passes` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from unsloth.core.log import get_logger
from unsloth.kernels.causal_attention import Attended
from unsloth.kernels.lora_linear import flatten_adapters
from unsloth.kernels.lora_mlp import finish_gradients
from unsloth.kernels.rope import RopeTables
from unsloth.layers.block_passes import Parts, backward_pass, forward_pass
from unsloth.layers.block_sizes import RECORDED_ROWS
from unsloth.layers.linear import Identity
from unsloth.memory.budget import Place
from unsloth.memory.keeper import Decision

_SHAPES = 4
_CALLS_BEFORE = 2

logger = get_logger(__name__)


class Recorded(Protocol):
    """A CUDA graph."""

    def replay(self) -> None:
        """Compute again what was recorded."""


@dataclass(slots=True)
class Shared:
    """What the graphs of one shape have in common.

    Attributes:
        x: (M, K) in.
        y: (M, K) out; in the backward first the gradient that comes in, then the one that goes out.
        out: (B, T, H, D) o.
        lse: Its log-sum-exp.
        t_d: (M, columns).
        flat: (numbers,) all adapter gradients.
        tables: Of the rotary embedding.
        source: What they were last copied from, and its version.
        pool: Of memory inside the graphs.
        stream: On which they are recorded.
    """

    x: torch.Tensor
    y: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    t_d: torch.Tensor
    flat: torch.Tensor
    tables: RopeTables | None
    source: tuple[torch.Tensor, int] | None
    pool: Any
    stream: Any

    @classmethod
    def like(
        cls, x: torch.Tensor, attended: Attended, t_d: torch.Tensor, parts: Parts, numbers: int, pool: tuple[Any, Any]
    ) -> Shared:
        """Buffers for values like these."""
        tables = parts.tables
        if tables is not None:
            cos, sin = tables.cos.contiguous().clone(), tables.sin.contiguous().clone()
            tables = RopeTables(cos, sin, None, tables.rotary_dim, tables.interleaved)
        return cls(
            x=torch.empty_like(x),
            y=torch.empty_like(x),
            out=torch.empty_like(attended.out, memory_format=torch.contiguous_format),
            lse=torch.empty_like(attended.lse, memory_format=torch.contiguous_format),
            t_d=torch.empty_like(t_d, memory_format=torch.contiguous_format),
            flat=torch.empty(numbers, dtype=torch.float32, device=x.device),
            tables=tables,
            source=None,
            pool=pool[0],
            stream=pool[1],
        )

    def set_tables(self, parts: Parts) -> None:
        """Have the rotary embedding of this very batch."""
        if parts.tables is None or self.tables is None:
            return
        cos = parts.tables.cos
        if self.source is None or self.source[0].data_ptr() != cos.data_ptr() or self.source[1] != cos._version:
            self.tables.cos.copy_(cos)
            self.tables.sin.copy_(parts.tables.sin)
            self.source = cos, cos._version  # held, so that nothing else can be at its address


@dataclass(slots=True)
class Captured:
    """The graphs of one block.

    Attributes:
        signature: Of what they were recorded with.
        shared: Buffers.
        replay_forward: The graph.
        replay_backward: The graph.
        attended: As the forward leaves it in the shared buffers.
        shapes: Of the adapters' gradients, None where there is none.
        needs_x: Whether x gets a gradient.
        parts: What they were recorded with, which must not be freed.
        weights: The same of base weights.
    """

    signature: tuple
    shared: Shared
    replay_forward: Recorded
    replay_backward: Recorded
    attended: Attended
    shapes: list[torch.Size | None]
    needs_x: bool
    parts: Parts
    weights: Identity

    def forward(self, parts: Parts, x: torch.Tensor) -> tuple[torch.Tensor, Attended, torch.Tensor]:
        """As :func:`unsloth.layers.block_passes.forward_pass`."""
        shared = self.shared
        shared.set_tables(parts)
        shared.x.copy_(x)
        self.replay_forward.replay()
        attended = replace(self.attended, out=shared.out.clone(), lse=shared.lse.clone())
        return shared.y.clone(), attended, shared.t_d.clone()

    def backward(
        self, parts: Parts, x: torch.Tensor, attended: Attended, t_d: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """As backward_pass, with finished gradients."""
        shared = self.shared
        shared.set_tables(parts)
        to = [shared.x, shared.out, shared.lse, shared.t_d, shared.y]
        for buffer, value in zip(to, (x, attended.out, attended.lse, t_d, grad), strict=True):
            buffer.copy_(value)
        self.replay_backward.replay()
        sizes = [0 if shape is None else shape.numel() for shape in self.shapes]
        pieces = shared.flat[: sum(sizes)].clone().split(sizes)
        found = [None if s is None else piece.view(s) for s, piece in zip(self.shapes, pieces, strict=True)]
        return shared.y.clone() if self.needs_x else None, found


@dataclass(slots=True)
class Shape:
    """What is known of one shape of batches.

    Attributes:
        calls: Of each block, by number.
        shared: Once there are graphs.
        captured: By number.
        failed: Whether recording was given up.
    """

    calls: dict[int, int] = field(default_factory=dict)
    shared: Shared | None = None
    captured: dict[int, Captured] = field(default_factory=dict)
    failed: bool = False


def find(parts: Parts, x: torch.Tensor, shape: torch.Size, needs: tuple[bool, ...]) -> Captured | None:
    """The graphs for this call, recorded now if it is time; None if the block is to be computed call by call.

    Args:
        parts: Of the call.
        x: (M, K).
        shape: (B, T, K).
        needs: Whether x, and each A and B, want a gradient.
    """
    keeper = parts.keeper
    fits = parts.visible.single and not parts.visible.window and all(needs[1:]) and x.shape[0] <= RECORDED_ROWS
    if not keeper.captures or not fits or not can_record(x):
        return None
    key = (shape, x.dtype, x.device, parts.decision.lean)
    known = _shape(keeper.shapes, key)
    if known is None:
        return None
    calls = known.calls[parts.number] = known.calls.get(parts.number, 0) + 1
    if known.failed or calls <= _CALLS_BEFORE:
        return None
    signature = _signature(parts, needs)
    captured = known.captured.get(parts.number)
    if captured is None or captured.signature != signature:
        known.captured.pop(parts.number, None)
        try:
            known.captured[parts.number] = captured = _capture(known, parts, x, shape, needs, signature)
        except RuntimeError as error:
            known.failed = True
            known.captured.clear()
            known.shared = None
            logger.warning("blocks are launched call by call: recording them failed: %s", str(error).splitlines()[0])
            return None
    return captured


def _shape(shapes: dict[tuple, Shape], key: tuple) -> Shape | None:
    """What is known of ``key``; a new one takes the place of one without graphs, if there are many already."""
    if key not in shapes and len(shapes) >= _SHAPES:
        idle = next((other for other, known in shapes.items() if not known.captured), None)
        if idle is None:
            return None
        del shapes[idle]
    return shapes.setdefault(key, Shape())


def _signature(parts: Parts, needs: tuple[bool, ...]) -> tuple:
    """Equal for two calls only if the same graphs compute both."""
    linears = parts.linears()
    adapters = [linear.adapter for linear in linears]
    return (
        needs,
        parts.backend,
        parts.mlp.tile,
        parts.norm[0].data_ptr(),
        parts.mlp.weight.data_ptr(),
        *(None if norm is None else norm.data_ptr() for norm in parts.head_norms or ()),
        Identity.of(linears).key,
        *(None if a is None else (a.a.data_ptr(), a.b.data_ptr(), a.a.shape, a.b.dtype, a.scale) for a in adapters),
    )


def _capture(
    known: Shape, parts: Parts, x: torch.Tensor, shape: torch.Size, needs: tuple[bool, ...], signature: tuple
) -> Captured:
    pairs, scales = flatten_adapters([linear.adapter for linear in parts.linears()])
    if known.shared is None:
        _, attended, t_d, _ = forward_pass(parts, x, shape, keep=False)
        numbers = sum(pair.numel() for pair in pairs if pair is not None)
        others = (other.shared for other in parts.keeper.shapes.values() if other.captured and other.shared)
        pool = next(((shared.pool, shared.stream) for shared in others), None) or new_pool(x.device)
        known.shared = Shared.like(x, attended, t_d, parts, numbers, pool)
        del attended, t_d
    shared = known.shared
    fixed = replace(parts, tables=shared.tables, decision=Decision(Place.RECOMPUTE, parts.decision.lean))
    left: list[Attended] = []
    shapes: list[torch.Size | None] = []

    def forward() -> None:
        y, attended, t_d, _ = forward_pass(fixed, shared.x, shape, keep=False)
        for to, value in ((shared.y, y), (shared.out, attended.out), (shared.lse, attended.lse), (shared.t_d, t_d)):
            to.copy_(value)
        left[:] = [replace(attended, out=shared.out, lse=shared.lse)]

    def backward() -> None:
        dx, raw = backward_pass(fixed, shared.x, left[0], shared.t_d, None, shared.y, needs, shape)
        if dx is not None:
            shared.y.copy_(dx)
        shapes[:] = _collect(finish_gradients(raw, pairs, scales, needs[1:]), shared.flat)

    first, second = record(shared, forward), record(shared, backward)
    weights = Identity.of(parts.linears())
    return Captured(signature, shared, first, second, left[0], shapes, needs[0], fixed, weights)


def _collect(found: Sequence[torch.Tensor | None], flat: torch.Tensor) -> list[torch.Size | None]:
    start = 0
    for grad in found:
        if grad is not None:
            flat[start : start + grad.numel()].view(grad.shape).copy_(grad)
            start += grad.numel()
    return [None if grad is None else grad.shape for grad in found]


def record(shared: Shared, launch: Callable[[], None]) -> Recorded:
    """What ``launch`` launches, to be replayed; nothing is computed now."""
    graph = torch.cuda.CUDAGraph()
    stream = shared.stream
    stream.wait_stream(torch.cuda.current_stream(shared.x.device))
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(shared.x.device).wait_stream(stream)
    return graph


def can_record(x: torch.Tensor) -> bool:
    """Whether launches for ``x`` can be recorded."""
    return x.is_cuda


def new_pool(device: torch.device) -> tuple[Any, Any]:
    """Memory for graphs, and the stream on which they are recorded."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
