"""Forward and backward of blocks as recorded CUDA graphs: one launch in the place of sixty.

A block of 4,096 tokens keeps an H100 busy for 3 ms forward and 7 ms backward, hardly longer than Python needs to launch
its kernels; smaller ones wait for Python. Where batches of one shape come again and again, the launches of each block
are recorded at the third such batch and replayed from then on.

All graphs of one shape share buffers for what goes in and out, which are a part of a longer shape's where there is one,
and those of all shapes one pool of memory, since they run one after the other. What a block keeps for its backward is
written to the same place at every replay: such memory stays from pass to pass
(:meth:`unsloth.memory.keeper.Keeper.may_stand`), and while it is in use a second forward is computed call by call.
Where the documents of a packed batch begin is one of the inputs, with room for some more
(:meth:`unsloth.kernels.causal_attention.Visible.room`). A replay reads weights and adapters where they were when it was
recorded; whether they still are there is asked at each call. What is computed is what
:mod:`unsloth.layers.block_passes` computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from unsloth.core.log import get_logger
from unsloth.kernels.causal_attention import Attended, Visible
from unsloth.kernels.lora_linear import flatten_adapters
from unsloth.kernels.lora_mlp import finish_gradients
from unsloth.kernels.rope import RopeTables
from unsloth.layers.block_passes import Parts, Rest, backward_pass, forward_pass
from unsloth.layers.block_sizes import RECORDED_ROWS
from unsloth.layers.linear import Identity
from unsloth.memory.budget import Place

_SHAPES = 16
_CALLS_BEFORE = 2

logger = get_logger(__name__)


class Recorded(Protocol):
    """A CUDA graph."""

    def replay(self) -> None:
        """Compute again what was recorded."""


@dataclass(slots=True)
class Values:
    """What the backward of a block starts from, at fixed addresses.

    Attributes:
        x: (M, K).
        attended: o (B, T, H, D) with its log-sum-exp.
        t_d: (M, columns).
        rest: What is computed again otherwise; None of blocks that keep nothing more.
    """

    x: torch.Tensor
    attended: Attended
    t_d: torch.Tensor
    rest: Rest | None = None

    @classmethod
    def like(cls, x: torch.Tensor, attended: Attended, t_d: torch.Tensor, roomy: Values | None) -> Values:
        """Room for values like these; the large ones in that of ``roomy``, if given, of as many tokens or more."""
        if roomy is None:
            out = torch.empty_like(attended.out, memory_format=torch.contiguous_format)
        else:
            out = roomy.attended.out.view(-1)[: attended.out.numel()].view(attended.out.shape)
        lse = torch.empty_like(attended.lse, memory_format=torch.contiguous_format)
        t_d = torch.empty_like(t_d, memory_format=torch.contiguous_format)
        own = torch.empty_like(x) if roomy is None else roomy.x[: x.shape[0]]
        return cls(own, replace(attended, out=out, lse=lse, more=()), t_d)

    def tensors(self) -> list[torch.Tensor]:
        """Those that are copied from block to block, where blocks share them."""
        return [self.x, self.attended.out, self.attended.lse, self.t_d]


@dataclass(slots=True)
class Buffer:
    """What goes in and out of graphs, and comes from one of them to the next.

    Attributes:
        rows: (M, K) of the shape that it was made for, of which shorter ones use the first.
        given: A copy that was handed out since a graph wrote it, and its version.
    """

    rows: torch.Tensor
    given: tuple[torch.Tensor, int] | None = None


@dataclass(slots=True)
class Shared:
    """What the graphs of one shape have in common.

    Attributes:
        buffer: Of y.
        y: (M, K) first x, then y; in the backward first the gradient that comes in, then the one that goes out.
        flat: (numbers,) all gradients of adapters, or of the block's own weights.
        tables: Of the rotary embedding.
        source: What they were last copied from, and its version.
        visible: Which keys a query sees, where the shape of the batch does not say it.
        bounds: What it was last copied from.
        pool: Of memory inside the graphs.
        stream: On which they are recorded.
        values: Of the blocks that keep no more than the least.
    """

    buffer: Buffer
    y: torch.Tensor
    flat: torch.Tensor
    tables: RopeTables | None
    source: tuple[torch.Tensor, int] | None
    visible: Visible | None
    bounds: torch.Tensor | None
    pool: Any
    stream: Any
    values: Values | None = None

    @classmethod
    def like(cls, x: torch.Tensor, parts: Parts, numbers: int, pool: tuple[Any, Any], roomy: Shared | None) -> Shared:
        """For a call with ``parts`` and ``x`` (M, K), and as many ``numbers`` in gradients.

        What ``roomy``, if given, has for as many tokens or more is used in common: nothing in it lasts longer than a
        replay.
        """
        buffer = Buffer(torch.empty_like(x)) if roomy is None else roomy.buffer
        tables = parts.tables
        if tables is not None:
            cos, sin = tables.cos.contiguous().clone(), tables.sin.contiguous().clone()
            tables = RopeTables(cos, sin, None, tables.rotary_dim, tables.interleaved)
        dtype = x.dtype if parts.trained else torch.float32
        flat = torch.empty(numbers, dtype=dtype, device=x.device) if roomy is None else roomy.flat
        room = parts.visible.room()
        visible = None if room is None else parts.visible.within(room)
        return cls(buffer, buffer.rows[: x.shape[0]], flat, tables, None, visible, None, *pool)

    def take(self, x: torch.Tensor) -> None:
        """Have ``x`` (M, K) in the buffer, where it is already if it comes from the block that ran before."""
        given = self.buffer.given
        if given is None or given[0].data_ptr() != x.data_ptr() or given[1] != x._version or given[0].shape != x.shape:
            self.y.copy_(x)
        self.buffer.given = None

    def give(self) -> torch.Tensor:
        """A copy of the buffer."""
        found = self.y.clone()
        self.buffer.given = found, found._version  # held, so that nothing else can be at its address
        return found

    def set_batch(self, parts: Parts) -> None:
        """Have the rotary embedding and the documents of this very batch."""
        bounds = parts.visible.cu_seqlens
        if self.visible is not None and self.bounds is not bounds:
            self.visible.become(parts.visible)
            self.bounds = bounds
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
        values: What the backward starts from: the block's own where it keeps them, else the shared ones.
        replay_forward: The graph.
        replay_backward: The graph.
        shapes: Of the gradients, None where there is none.
        needs_x: Whether x gets a gradient.
        parts: What they were recorded with, which must not be freed.
        weights: The same of base weights.
        user: Whoever waits for the backward of the values kept, if somebody does.
    """

    signature: tuple
    shared: Shared
    values: Values
    replay_forward: Recorded
    replay_backward: Recorded
    shapes: list[torch.Size | None]
    needs_x: bool
    parts: Parts
    weights: Identity
    user: Callable[[], Any] = field(default=lambda: None)

    def forward(self, parts: Parts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Attended, torch.Tensor]:
        """(y, x for the backward, and more as :func:`unsloth.layers.block_passes.forward_pass`)."""
        shared, values = self.shared, self.values
        shared.set_batch(parts)
        shared.take(x)
        self.replay_forward.replay()
        y, attended = shared.give(), values.attended
        if values.rest is not None:
            return y, values.x, attended, values.t_d
        attended = replace(attended, out=attended.out.clone(), lse=attended.lse.clone())
        return y, x, attended, values.t_d.clone()

    def lend(self, user: Any) -> None:
        """Remember who waits for the backward, if values are kept for it."""
        if self.values.rest is not None:
            self.user = weakref.ref(user)

    def backward(
        self, parts: Parts, x: torch.Tensor, attended: Attended, t_d: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """As backward_pass, with finished gradients, of what the forward gave."""
        shared = self.shared
        shared.set_batch(parts)
        shared.take(grad)
        if self.values.rest is None:
            for buffer, value in zip(self.values.tensors(), (x, attended.out, attended.lse, t_d), strict=True):
                buffer.copy_(value)
        self.replay_backward.replay()
        sizes = [0 if shape is None else shape.numel() for shape in self.shapes]
        pieces = shared.flat[: sum(sizes)].clone().split(sizes)
        found = [None if s is None else piece.view(s) for s, piece in zip(self.shapes, pieces, strict=True)]
        return shared.give() if self.needs_x else None, found


@dataclass(slots=True)
class Reading:
    """The graph of one block's forward alone, for passes without gradients.

    Attributes:
        signature: Of what it was recorded with.
        shared: Buffers.
        replay: The graph.
        parts: What it was recorded with, which must not be freed.
        weights: The same of base weights.
    """

    signature: tuple
    shared: Shared
    replay: Recorded
    parts: Parts
    weights: Identity

    def forward(self, parts: Parts, x: torch.Tensor) -> torch.Tensor:
        """The first of what :func:`unsloth.layers.block_passes.forward_pass` gives."""
        self.shared.set_batch(parts)
        self.shared.take(x)
        self.replay.replay()
        return self.shared.give()


@dataclass(slots=True)
class Shape:
    """What is known of one shape of batches.

    Attributes:
        calls: Of each block, by number and by what decides which kernels it launches.
        shared: Once there are graphs.
        captured: By number.
        readings: By number, and whether there are adapters.
        failed: Whether recording was given up.
    """

    calls: dict[tuple[int, bool, bool], int] = field(default_factory=dict)
    shared: Shared | None = None
    captured: dict[int, Captured] = field(default_factory=dict)
    readings: dict[tuple[int, bool], Reading] = field(default_factory=dict)
    failed: bool = False

    def give_up(self, error: RuntimeError) -> None:
        """After recording failed."""
        self.failed = True
        self.captured.clear()
        self.readings.clear()
        self.shared = None
        logger.warning("blocks are launched call by call: recording them failed: %s", str(error).splitlines()[0])

    def release(self) -> None:
        """Drop the blocks that keep values for their backward."""
        self.captured = {number: one for number, one in self.captured.items() if one.values.rest is None}


def find(parts: Parts, x: torch.Tensor, shape: torch.Size, needs: tuple[bool, ...]) -> Captured | None:
    """The graphs for this call, recorded now if it is time; None if the block is to be computed call by call.

    Args:
        parts: Of the call.
        x: (M, K).
        shape: (B, T, K).
        needs: Whether x, each A and B, and the block's own weights, want a gradient.
    """
    keeper, batch = parts.keeper, (*shape, parts.visible.room())
    if not any(needs[1:]) or not _may_record(parts, x):
        return None
    known = _shape(keeper.shapes, (batch, x.dtype, x.device))
    if known is None:
        return None
    if parts.number == 0:
        keeper.began(batch)
    form = (parts.number, parts.decision.place is Place.KEEP, parts.decision.lean)
    calls = known.calls[form] = known.calls.get(form, 0) + 1
    if known.failed or calls <= _CALLS_BEFORE:
        return None
    signature = _signature(parts, needs)
    captured = known.captured.get(parts.number)
    if captured is None or captured.signature != signature:
        if captured is not None and captured.values.rest is not None:
            keeper.stands(batch, parts.number, 0)
        known.captured.pop(parts.number, None)
        captured = None  # its memory, before more is taken
        if parts.decision.place is Place.KEEP and not keeper.may_stand(batch):
            return None
        captured = _captured(known, parts, x, shape, needs, signature)
    return None if captured is None or captured.user() is not None else captured


def _captured(
    known: Shape, parts: Parts, x: torch.Tensor, shape: torch.Size, needs: tuple[bool, ...], signature: tuple
) -> Captured | None:
    """Graphs recorded now; None, once and for all, if that fails."""
    try:
        captured = _capture(known, parts, x, shape, needs, signature)
    except RuntimeError as error:
        known.give_up(error)
        return None
    known.captured[parts.number] = captured
    return captured


def find_reading(parts: Parts, x: torch.Tensor, shape: torch.Size) -> Reading | None:
    """As :func:`find`, for a pass without gradients: where training passes of such batches are recorded already."""
    known = parts.keeper.shapes.get(((*shape, parts.visible.room()), x.dtype, x.device))
    if known is None or known.shared is None or not _may_record(parts, x):
        return None
    if x.is_inference() or torch.is_inference_mode_enabled():  # such tensors do not tell whether they were changed
        return None
    signature = _signature(parts, ())
    which = parts.number, any(linear.adapter is not None for linear in parts.linears())
    reading = known.readings.get(which)
    if reading is None or reading.signature != signature:
        try:
            known.readings[which] = reading = _capture_reading(known.shared, parts, shape, signature)
        except RuntimeError as error:
            known.give_up(error)
            return None
    return reading


def _may_record(parts: Parts, x: torch.Tensor) -> bool:
    fits = not parts.visible.window and x.shape[0] <= RECORDED_ROWS
    if parts.trained:  # what graphs work with is theirs for good
        fits = fits and parts.keeper.captures_own and not parts.keeper.assignment.tight
    return fits and parts.keeper.captures and can_record(x)


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
        parts.decision.place is Place.KEEP,
        parts.decision.lean,
        id(parts.qkv.held),
        parts.backend,
        parts.mlp.tile,
        *(None if weight is None else (id(weight), weight.data_ptr()) for weight in parts.weights()),
        None if parts.trained else Identity.of(linears).key,  # frozen ones may be dequantized and held
        *(None if a is None else (a.a.data_ptr(), a.b.data_ptr(), a.a.shape, a.b.dtype, a.scale) for a in adapters),
    )


def _capture(
    known: Shape, parts: Parts, x: torch.Tensor, shape: torch.Size, needs: tuple[bool, ...], signature: tuple
) -> Captured:
    pairs, _ = flatten_adapters([linear.adapter for linear in parts.linears()])
    keep = parts.decision.place is Place.KEEP
    shared = _prepare(known, parts, x, shape)
    fixed = _at_buffers(parts, shared)
    left: list[Values] = []
    shapes: list[torch.Size | None] = []
    own = torch.empty_like(x) if keep or shared.values is None else shared.values.x

    def forward() -> list[torch.Tensor]:
        if keep:
            own.copy_(shared.y)
        _, attended, t_d, rest = forward_pass(fixed, own if keep else shared.y, shape, keep=keep, out=shared.y)
        if not keep and shared.values is not None:
            for to, value in zip(shared.values.tensors()[1:], (attended.out, attended.lse, t_d), strict=True):
                to.copy_(value)
            at = shared.values.attended
            attended, t_d = replace(attended, out=at.out, lse=at.lse), shared.values.t_d
        left[:] = [Values(own, attended, t_d, rest)]
        return [attended.out, attended.lse, t_d, *_tensors(rest)]

    def backward() -> list[torch.Tensor]:
        rest = None if values.rest is None else replace(values.rest)  # which the backward uses up
        more = values.x, values.attended, values.t_d, rest
        own = fixed.own(needs[1:], shared.flat)
        _, raw = backward_pass(fixed, *more, shared.y, needs, shape, out=shared.y, own=own)
        found = finish_gradients(raw, pairs, needs[1 : 1 + len(pairs)])
        shapes[:] = _collect([*found, *(own.finished() if own is not None else ())], shared.flat)
        return []

    first = record(shared, forward)
    values = left[0]
    if keep:
        size = sum(tensor.nbytes for tensor in (*values.tensors(), *_tensors(values.rest)))
        parts.keeper.stands((*shape, parts.visible.room()), parts.number, size)
    second = record(shared, backward)
    weights = Identity.of(parts.linears())
    return Captured(signature, shared, values, first, second, shapes, needs[0], fixed, weights)


def _prepare(known: Shape, parts: Parts, x: torch.Tensor, shape: torch.Size) -> Shared:
    """Buffers, and whatever else recording must find in place."""
    keep = parts.decision.place is Place.KEEP
    if known.shared is None:
        adapters = [linear.adapter for linear in parts.linears()]
        numbers = sum(a.a.numel() + a.b.numel() for a in adapters if a is not None)
        numbers += sum(weight.numel() for weight in parts.weights() if weight is not None) if parts.trained else 0
        others = [other.shared for other in parts.keeper.shapes.values() if other.captured and other.shared]
        pool = next(((shared.pool, shared.stream) for shared in others), None) or new_pool(x.device)
        known.shared = Shared.like(x, parts, numbers, pool, _roomy(others, x, numbers))
    if known.shared.values is None and not keep:
        _, attended, t_d, _ = forward_pass(parts, x, shape, keep=False)
        others = [other.shared for other in parts.keeper.shapes.values() if other.shared and other.shared.values]
        roomy = _roomy(others, x, 0)
        known.shared.values = Values.like(x, attended, t_d, None if roomy is None else roomy.values)
    _hold(parts, x.dtype)
    if keep and not any(other.values.rest is not None for other in known.captured.values()):
        make_room(x)
    return known.shared


def _roomy(others: list[Shared], x: torch.Tensor, numbers: int) -> Shared | None:
    """One of ``others`` that has room for ``x`` (M, K) and so many ``numbers`` in gradients."""
    for other in others:
        rows = other.y
        same = (rows.dtype, rows.device, rows.shape[1]) == (x.dtype, x.device, x.shape[1])
        if same and rows.shape[0] >= x.shape[0] and other.flat.numel() >= numbers:
            return other
    return None


def _capture_reading(shared: Shared, parts: Parts, shape: torch.Size, signature: tuple) -> Reading:
    fixed = _at_buffers(parts, shared)
    _hold(parts, shared.y.dtype)

    def forward() -> list[torch.Tensor]:
        forward_pass(fixed, shared.y, shape, keep=False, out=shared.y)
        return []

    return Reading(signature, shared, record(shared, forward), fixed, Identity.of(parts.linears()))


def _at_buffers(parts: Parts, shared: Shared) -> Parts:
    """Parts that read what differs from batch to batch from the buffers."""
    decision = replace(parts.decision, place=Place.RECOMPUTE)
    return replace(parts, tables=shared.tables, visible=shared.visible or parts.visible, decision=decision)


def _hold(parts: Parts, dtype: torch.dtype) -> None:
    """Have the weights that are to be held, before a recording that would have them in memory of its own."""
    for site in (parts.qkv, parts.output, parts.mlp.gate_up, parts.mlp.down):
        if site.held is not None:
            site.group(dtype)


def _tensors(rest: Rest | None) -> list[torch.Tensor]:
    """What is kept at its address."""
    if rest is None or rest.mlp is None:
        return []
    return [rest.qkv, rest.t_qkv, rest.t_o, rest.h, rest.mlp.t_gu, rest.mlp.gated]


def _collect(found: Sequence[torch.Tensor | None], flat: torch.Tensor) -> list[torch.Size | None]:
    start = 0
    for grad in found:
        if grad is not None:
            to = flat[start : start + grad.numel()].view(grad.shape)
            if to.data_ptr() != grad.data_ptr():
                to.copy_(grad)
            start += grad.numel()
    return [None if grad is None else grad.shape for grad in found]


def record(shared: Shared, launch: Callable[[], list[torch.Tensor]]) -> Recorded:
    """What ``launch`` launches, to be replayed; nothing is computed now.

    What it returns is where each replay leaves its values.
    """
    graph = torch.cuda.CUDAGraph()
    stream = shared.stream
    stream.wait_stream(torch.cuda.current_stream(shared.y.device))
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(shared.y.device).wait_stream(stream)
    return graph


def can_record(x: torch.Tensor) -> bool:
    """Whether launches for ``x`` can be recorded."""
    return x.is_cuda


def make_room(x: torch.Tensor) -> None:
    """Give back memory that nothing uses, since recording takes its own and cannot do that itself."""
    if x.is_cuda:
        torch.cuda.empty_cache()


def new_pool(device: torch.device) -> tuple[Any, Any]:
    """Memory for graphs, and the stream on which they are recorded."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
